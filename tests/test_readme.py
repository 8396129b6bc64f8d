"What the README shows is what works."
import json
import re
import statistics
from pathlib import Path
import torch
import yaml
from ppc.parameters import settings
from ppc.pipeline import METHODS
from ppc.stages import affinity_options, segmentation_recipe

ROOT = Path(__file__).parent.parent
README = (ROOT/'README.md').read_text()


def block(language, word): return next(b for b in re.findall(rf'```{language}\n(.*?)```', README, re.S) if word in b)


def test_a_strangers_classifier_gains_the_loss():
    code = block('python', 'torchvision')
    assert len([l for l in code.splitlines() if l.strip()]) <= 15
    torch.manual_seed(0)
    names = {'images': torch.randn(2, 3, 224, 224), 'tags': torch.eye(4)[:2]}
    exec(code, names)
    names['loss'].backward()
    assert names['loss'].isfinite() and names['project'].weight.grad.abs().sum() > 0 and names['net'].conv1.weight.grad.abs().sum() > 0


def test_parameters_of_own_photographs_are_parameters():
    p = yaml.safe_load(block('yaml', 'my-data'))
    assert p.pop('out') and set(p.pop('methods')) <= {*METHODS, 'cam+ppc'}
    *_, refinement, segmentation = settings(**p).values()
    assert affinity_options(refinement).t == 64 and segmentation_recipe(segmentation).iterations == 4000


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
        for name, v in rows.items(): lines.append(f'| {name} | {" | ".join(f"{round(x, 1) + 0:.1f}" for x in v)} | {statistics.mean(v):.1f} ± {statistics.stdev(v):.1f} |')
        return '\n'.join(lines)
    return table('seed mIoU, %', seeds | minus), table('mIoU, %', best)


def test_speeds_are_those_of_the_bench():
    crf, psa, irn = json.loads((ROOT/'runs'/'bench'/'x86-64-2-threads.json').read_text())[2:]
    assert f'{crf["ratio"]:.2f} times as fast on one core (375×500, 4 labels, 10 steps), in {crf["extra_mb"]:.0f} MB' in README
    assert f'{psa["ratio"]:.0f} and IRN\'s {irn["ratio"]:.0f} times as fast as squaring a dense matrix' in README
    assert f'in {irn["extra_mb"]:.0f} MB where that takes {irn["dense_mb"]:.0f}' in README


def test_results_are_those_of_the_runs():
    for part in results(): assert part in README, part


def test_photographs_are_those_of_the_runs():
    found = {p.parent.name: f'{json.loads(p.read_text())["seed_miou"]["seam+ppc"]:.1f}' for p in (ROOT/'runs'/'results'/'voc-animals').glob('*/metrics.json')}
    assert f'**{found["official"]}** in the authors\' reading and **{found["paper"]}** in the paper\'s' in README
    runs = [json.loads((ROOT/'runs'/'results'/'voc-animals'/f'masks-seed{s}'/'metrics.json').read_text())['table'] for s in (0, 1)]
    pair = lambda stage: ' and '.join(f"{next(r['miou'] for r in rows if r['stage'] == stage):.1f}" for rows in runs)
    assert f"seeds {pair('seed')}, + CRF {pair('+CRF')}, PSA {pair('PSA')}; a segmenter learned from PSA's masks {pair('segmenter')} on" in README
    assert f'from {found["paper"]} down to {found["paper-without-gradient"]}' in README
