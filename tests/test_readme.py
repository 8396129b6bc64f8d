"What the README shows is what works."
import inspect
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from typer.testing import CliRunner
from ppc.cli import app
from ppc.data import TagFolder, read_mask
from ppc.pipeline import METHODS
from ppc.scenes import scene
from ppc.sweeps import grid, sweep
from ppc.tables import collect_numbers, over_seeds, read_table, update_tables

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()


def block(language, word): return next(b for kind, b in re.findall(r'```(\w*)\n(.*?)```', README, re.S) if kind == language and word in b)


def test_a_strangers_classifier_gains_the_loss():
    code = block('python', 'torchvision')
    assert len([l for l in code.splitlines() if l.strip()]) <= 15
    torch.manual_seed(0)
    names = {'images': torch.randn(2, 3, 224, 224), 'tags': torch.eye(4)[:2]}
    exec(code, names)
    names['loss'].backward()
    assert names['loss'].isfinite() and names['project'].weight.grad.abs().sum() > 0 and names['net'].conv1.weight.grad.abs().sum() > 0


def made_up(folder, n=30):
    "Photographs of two made-up classes in `photos`, a spreadsheet of what is in them, and a few of which nothing is known in `more-photos`."
    rng, rows = np.random.default_rng(0), ['photo,what is in it']
    for i in range(n + 3):
        image, mask, _ = scene(rng)
        path = folder/('photos' if i < n else 'more-photos')/f'IMG {i}.jpg'
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image[:, :112]).save(path)
        if i < n:
            rows.append(f'IMG {i}.jpg,{" ".join(sorted({("snark", "boojum")[c % 2] for c in np.unique(mask[:, :112]) if c}))}')
    (folder/'tags.csv').write_text('\n'.join(rows))


def test_own_photographs_in_five_commands(tmp_path):
    "The README's own lines, from nothing to masks; ImageNet's weights cannot be fetched in a test, so the tiny network goes, as the README has it for that case."
    lines = block('', 'ppc data folder').strip().splitlines()
    instead = re.search("add `(-p backbone=tiny .*?)`", README)[1]
    assert len(lines) <= 5 and lines[0] == 'make install' and re.search(r'^install: \.venv/ready', (ROOT/'Makefile').read_text(), re.M)
    made_up(tmp_path)
    (tmp_path/'recipes').symlink_to(ROOT/'recipes')
    for line in lines[1:]:
        command = line.replace('.venv/bin/ppc', str(Path(sys.executable).parent/'ppc')) + (f' {instead}' if ' run ' in line else '')
        found = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, 'TQDM_DISABLE': '1'})
        assert found.returncode == 0, f'{line}\n{found.stdout}\n{found.stderr}'
    data = TagFolder(tmp_path/'datasets'/'mine')
    assert data.classes == ['background', 'boojum', 'snark'] and len(data) == 30
    for k, i in enumerate(data.ids):
        assert read_mask(tmp_path/'runs'/'mine'/'masks'/f'{i}.png').shape == (128, 112)
    assert (tmp_path/'runs'/'mine'/'run.ipynb').is_file()
    for i in (30, 31, 32):
        assert read_mask(tmp_path/'predicted'/'masks'/f'IMG {i}.png').max() <= 2
    assert 'image,class,pixels,fraction' in (tmp_path/'predicted'/'areas.csv').read_text()


def test_commands_of_the_papers_runs_exist():
    "Each line for VOC has a command that has those arguments, and a recipe that is there."
    lines = [l.split('#')[0].strip() for l in block('', 'ppc data voc').strip().splitlines()]
    assert {*re.findall(r'recipes/\w+\.yaml', README)} == {f'recipes/{p.name}' for p in (ROOT/'recipes').glob('*.yaml')}
    for line in lines[:-1]:
        words = line.split()
        command = [w for w in words[1:] if w in ('data', 'voc', 'saliency', 'weights', 'plan', 'run')]
        text = CliRunner().invoke(app, [*command, '--help'], env={'COLUMNS': '200', 'TERM': 'dumb'}).output
        for option in (w for w in words if w.startswith('-')):
            assert option in text, line


def runs(name): return [json.loads((ROOT/'runs'/'results'/f'{name}-seed{seed}'/'metrics.json').read_text()) for seed in range(3)]


def results():
    "The README's tables, from the runs they report: `ppc demo` with three seeds, and the same refined by IRN."
    demo, irn = runs('demo'), runs('irn')
    assert [r['best'] for r in irn] == [r['best'] for r in demo]
    seeds = {m: [r['seed_miou'][m] for r in demo] for m in METHODS}
    minus = {f'seam+ppc minus {m}': [a - b for a, b in zip(seeds['seam+ppc'], seeds[m])] for m in METHODS[:2]}
    best = {'the best seeds': [r['seed_miou'][r['best']] for r in demo], '+ CRF': [r['seed_crf_miou'][r['best']] for r in demo],
            'PSA': [r['mask_miou'] for r in demo], 'IRN': [r['mask_miou'] for r in irn],
            'segmenter on val, learned from PSA': [r['segmentation_miou'] for r in demo], 'segmenter on val, learned from IRN': [r['segmentation_miou'] for r in irn]}
    def table(title, rows):
        lines = [f'| {title} | seed 0 | seed 1 | seed 2 | mean ± std |', '|---|---|---|---|---|']
        for name, v in rows.items():
            lines.append(f'| {name} | {" | ".join(f"{round(x, 1) + 0:.1f}" for x in v)} | {statistics.mean(v):.1f} ± {statistics.stdev(v):.1f} |')
        return '\n'.join(lines)
    return table('seed mIoU, %', seeds | minus), table('mIoU, %', best)


def test_speeds_are_those_of_the_bench():
    loader, _, _, crf, psa, irn = json.loads((ROOT/'runs'/'bench'/'x86-64-2-threads.json').read_text())
    assert f'makes {loader["images_per_s"]:.0f} training views' in README and f'checks {loader["checked_per_s"]:.0f} images' in README
    assert f'{crf["ratio"]:.2f} times as fast on one core (375×500, 4 labels, 10 steps), in {crf["extra_mb"]:.0f} MB' in README
    assert f'{psa["ratio"]:.0f} and IRN\'s {irn["ratio"]:.0f} times as fast as squaring a dense matrix' in README
    assert f'in {irn["extra_mb"]:.0f} MB where that takes {irn["dense_mb"]:.0f}' in README


def test_results_are_those_of_the_runs():
    for part in results():
        assert part in README, part


def test_photographs_are_those_of_the_runs():
    found = {p: f'{json.loads((ROOT/"runs"/"results"/"voc-animals"/p/"metrics.json").read_text())["seed_miou"]["seam+ppc"]:.1f}' for p in ('official', 'paper', 'paper-without-gradient')}
    assert f'**{found["official"]}** in the authors\' reading and **{found["paper"]}** in the paper\'s' in README
    runs = [json.loads((ROOT/'runs'/'results'/'voc-animals'/f'masks-seed{s}'/'metrics.json').read_text())['table'] for s in (0, 1)]
    pair = lambda stage: ' and '.join(f"{next(r['miou'] for r in rows if r['stage'] == stage):.1f}" for rows in runs)
    assert f"seeds {pair('seed')}, + CRF {pair('+CRF')}, PSA {pair('PSA')}; a segmenter learned from PSA's masks {pair('segmenter')} on" in README
    assert f'from {found["paper"]} down to {found["paper-without-gradient"]}' in README
    seam = [json.loads((ROOT/'runs'/'results'/'voc-animals'/f'seam-seed{s}'/'metrics.json').read_text())['seed_miou']['seam'] for s in (0, 1)]
    gains = [next(r['miou'] for r in rows if r['stage'] == 'seed') - s for rows, s in zip(runs, seam)]
    assert f'SEAM {seam[0]:.1f}, SEAM + contrast' in README and f'is worth {gains[0]:.1f} and {gains[1]:.1f} points over SEAM (seeds 0 and 1)' in README


def test_tables_are_made_from_their_runs():
    assert update_tables(README, ROOT) == README, 'run: ppc table README.md'
    shown = {root for root, _ in re.findall(r'<!-- ppc table (\S+) (.+?) -->', README)}
    assert len(shown) >= 7
    for root in shown:
        table, found = read_table(ROOT/root)
        assert table.paper or Path(root).name.split('-')[0] in ('variance', 'longer')
        seeds = {json.dumps(r['settings'].get('chance') or r['settings'].get('seed')) for r in found}
        assert len(seeds) >= 3 or root.endswith('animals'), root


def test_k_is_as_flat_as_its_runs():
    table, found = read_table(ROOT/'runs'/'results'/'k')
    means = over_seeds(collect_numbers(found, table)).xs('train', level='column')['mean'][['K = 8', 'K = 16', 'K = 32', 'K = 64']]
    assert f'Flat within {means.max() - means.min():.1f} points from 8 to 64' in README


def test_results_name_no_machine():
    "Records of runs are of anybody's machine: no path from the root, and settings that a run can be told again."
    for f in (ROOT/'runs'/'results').rglob('*.json'):
        assert not re.search(r'"(/|\.\./|~)', f.read_text()), f


def test_lines_for_slurm_fit():
    "The README's lines, with a stand-in for the cluster: what they hand over is what `sweep` takes."
    code, told = block('python', 'SLURMCluster'), []
    assert len(code.strip().splitlines()) == 3
    class Client:
        def __init__(self, cluster): pass
        def get_executor(self): return self
        map = staticmethod(map)
    class Cluster:
        def __init__(self, **how): told.append(how)
        def adapt(self, maximum_jobs): told.append(maximum_jobs)
    def swept(*args, **more): told.append(inspect.signature(sweep).bind(*args, **more).arguments)
    exec(code, dict(SLURMCluster=Cluster, Client=Client, grid=grid, sweep=swept))
    assert told[1] == 10 and (ROOT/told[2]['notebook']).is_file() and len(told[2]['grid']) == 9 and told[2]['map'] is map
