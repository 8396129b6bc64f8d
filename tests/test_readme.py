"What the README shows is what works."
import json
import re
import statistics
from pathlib import Path
import torch
import yaml
from ppc.parameters import settings
from ppc.pipeline import METHODS

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
    settings(**p)


def results():
    "The README's table, from the runs it reports: make demo, and the same with seeds 1 and 2."
    runs = [json.loads((ROOT/'runs'/'results'/f'demo-seed{seed}'/'metrics.json').read_text()) for seed in range(3)]
    seeds = [[r['seed_miou'][m] for r in runs] for m in METHODS]
    rows = [*zip(METHODS, seeds)] + [(f'seam+ppc minus {m}', [b - a for a, b in zip(seeds[i], seeds[2])]) for i, m in enumerate(METHODS[:2])]
    lines = ['| seed mIoU, % | seed 0 | seed 1 | seed 2 | mean ± std |', '|---|---|---|---|---|']
    for name, values in rows:
        lines.append(f'| {name} | {" | ".join(f"{v:.1f}" for v in values)} | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |')
    crf, demo = ', '.join(f'{m} {runs[0]["seed_crf_miou"][m]:.1f}' for m in METHODS), runs[0]
    return '\n'.join(lines), f'after CRF {crf}; segmenter on val {demo["segmentation_miou"]:.1f}, learned from {demo["best"]}'


def test_results_are_those_of_the_runs():
    for part in results(): assert part in README, part


def test_photographs_are_those_of_the_runs():
    found = {p.parent.name: f'{json.loads(p.read_text())["seed_miou"]["seam+ppc"]:.1f}' for p in (ROOT/'runs'/'results'/'voc-animals').glob('*/metrics.json')}
    assert f'**{found["official"]}** in the authors\' reading and **{found["paper"]}** in the paper\'s' in README
    assert f'from {found["paper"]} down to {found["paper-without-gradient"]}' in README
