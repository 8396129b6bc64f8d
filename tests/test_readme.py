"What the README shows is what works."
import re
from pathlib import Path
import torch
import yaml
from ppc.pipeline import METHODS, settings

README = (Path(__file__).parent.parent/'README.md').read_text()


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
