"What the README shows is what works."
import json
import re
import statistics
from pathlib import Path
import torch
import yaml
from ppc.pipeline import METHODS, settings

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
    rows = [(f'{m} {what}', [r[key][m] for r in runs]) for key, what in (('seed_miou', 'seed'), ('seed_crf_miou', 'seed + CRF')) for m in METHODS]
    rows += [('SEAM + contrast minus SEAM, seed', [r['seed_miou']['seam+ppc'] - r['seed_miou']['seam'] for r in runs]),
             ('segmenter on val', [r['segmentation_miou'] for r in runs])]
    lines = ['| mIoU, % | seed 0 | seed 1 | seed 2 | mean ± std |', '|---|---|---|---|---|']
    for name, values in rows:
        lines.append(f'| {name} | {" | ".join(f"{v:.1f}" for v in values)} | {statistics.mean(values):.1f} ± {statistics.stdev(values):.1f} |')
    return '\n'.join(lines)


def test_results_are_those_of_the_runs(): assert results() in README
