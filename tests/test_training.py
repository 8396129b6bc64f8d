"Killed, stopped or left alone: the same bits; what a machine lacks is said."
import os
import resource
import signal
import subprocess
import sys
import time
import pytest
import torch
from ppc.backbones import Tiny, load_weights, read_weights, torchvision_state
from ppc.data import DataError, TagFolder, WriteError
from ppc.methods import find_method, make_camnet
from ppc.parameters import Config
from ppc.sources import conversion_record
from ppc.training import Batches, fit, load_checkpoint, read_log
from ppc.work import Inputs, train_cam

pytestmark = pytest.mark.slow

RUN = '''
import sys, torch
torch.set_num_threads(1)
from ppc.parameters import Config
from ppc.methods import find_method
from ppc.work import Inputs, train_cam
from ppc.data import TagFolder
import ppc.training as training
from pathlib import Path
data, out, precision, slow = sys.argv[1], Path(sys.argv[2]), sys.argv[3], float(sys.argv[4])
plain = training._log_row
def record(*a):
    import time
    time.sleep(slow)
    return plain(*a)
training._log_row = record
out.mkdir(exist_ok=True)
config = Config.from_flat(epochs=3, batch_size=4, crop=64, target=32, k=4, ramp=.5,
                          precision=precision, ema=.9)   # the running mean is resumed as well
fit = training.fit
import ppc.work
ppc.work.fit = lambda *a, **k: fit(*a, **k, log_every=1)
inputs = Inputs({}, {'train': TagFolder(data)})
train_cam(out, inputs, config, find_method('seam+ppc'))
'''


def start(data, out, precision, slow=0):
    command = [sys.executable, '-c', RUN, data, out, precision, str(slow)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process):
    "Wait for the end: exit status, and what was written to stderr."
    error = process.communicate(timeout=300)[1]
    return process.returncode, error


@pytest.fixture(scope='module', params=['no', 'bf16'])   # bf16 has another memory format, too
def precision(request): return request.param


@pytest.fixture(scope='module')
def whole(scenes, precision, tmp_path_factory):
    "A run without interruption."
    out = tmp_path_factory.mktemp('whole')
    code, error = finish(start(scenes, out, precision))
    assert code == 0, error
    return out


def log_without_speed(out):
    rows = read_log(out/'log.jsonl')
    return [{k: v for k, v in row.items() if k != 'images_per_s'} for row in rows]


def wait_for_steps(out, n, process):
    while not (out/'log.jsonl').exists() or len(read_log(out/'log.jsonl')) < n:
        assert process.poll() is None, process.stderr.read()
        time.sleep(.02)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize('step', [6])
def test_stopped_and_resumed_is_the_same_bits(how, step, scenes, precision, whole, tmp_path):
    process = start(scenes, tmp_path, precision, slow=.2)
    wait_for_steps(tmp_path, step, process)
    process.send_signal(how)
    code, error = finish(process)
    assert code != 0 and not (tmp_path/'weights.safetensors').exists()
    done = torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step']
    if how == signal.SIGKILL:
        assert done == 4   # the last epoch's end
    else:
        assert done >= step and 'Stopped' in error
    code, error = finish(start(scenes, tmp_path, precision))
    assert code == 0, error
    a, b = (read_weights(f/'weights.safetensors') for f in (whole, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert log_without_speed(whole) == log_without_speed(tmp_path)


def test_truncated_checkpoint_is_named(scenes, precision, whole, tmp_path):
    (tmp_path/'checkpoint.pt').write_bytes((whole/'checkpoint.pt').read_bytes()[:5000])
    code, error = finish(start(scenes, tmp_path, precision))
    assert code != 0 and 'checkpoint.pt' in error and 'delete it' in error


class Numbers(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, key): return {'x': torch.tensor(float(sum(key)))}


def test_the_running_mean_by_hand(tmp_path):
    "The first step's weights, then a tenth of each later step's; and the progress in the batches."
    torch.manual_seed(0)
    model, seen, progress = torch.nn.Linear(1, 1), [], []
    def losses(model, batch):
        seen.append(model.weight.item())
        progress.append(batch['progress'])
        return {'l': (model(batch['x'][:, None])**2).mean()}
    optimizer = torch.optim.SGD(model.parameters(), .01)
    fit(model, losses, Numbers(), optimizer, tmp_path, 2, 4, device='cpu', ema=.9)
    mean, *later = [*seen[1:], model.weight.item()]
    for w in later:
        mean = .9*mean + .1*w
    kept = read_weights(tmp_path/'weights.safetensors')['weight'].item()
    assert kept == pytest.approx(mean, rel=1e-5)
    assert kept != pytest.approx(seen[-1], rel=1e-3)
    assert progress == [0, .25, .5, .75]


def train_numbers(out, losses, model=None, **options):
    torch.manual_seed(0)
    model = model or torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), .01)
    fit(model, losses, Numbers(), optimizer, out, 4, 4, device='cpu', **options)


def square(model, batch): return (model(batch['x'][:, None])**2).mean()


def test_one_process_trains_in_several_precisions(tmp_path):
    "And each training in its own: bf16 changes the weights, and what is repeated is the same."
    def losses(model, batch): return {'l': square(model, batch)}
    weights = []
    for n, precision in enumerate(('no', 'bf16', 'no')):
        train_numbers(tmp_path/str(n), losses, precision=precision)
        weights.append(read_weights(tmp_path/str(n)/'weights.safetensors')['weight'])
    first, half, again = weights
    assert torch.equal(first, again) and not torch.equal(first, half)


@pytest.mark.parametrize('step', [1, 2, 5, 8])
def test_a_term_that_is_no_number_between_logged_steps(step, tmp_path):
    "The error names term and step, and no checkpoint is written after it."
    def losses(model, batch):
        bad = round(8*batch['progress']) + 1 == step
        return {'l': square(model, batch), 'wild': torch.tensor(float('nan') if bad else 0.)}
    with pytest.raises(FloatingPointError, match=f'wild is nan at step {step} of 8'):
        train_numbers(tmp_path, losses, log_every=100)
    saved = tmp_path/'checkpoint.pt'
    assert not saved.exists() or torch.load(saved, weights_only=True)['step'] < step
    assert not (tmp_path/'weights.safetensors').exists()


@pytest.mark.parametrize('ema', [0., .9])
def test_a_last_gradient_that_is_no_number(tmp_path, ema):
    "The loss of the last step is finite, the weights after it are not."
    def losses(model, batch):
        zero = (0*model(batch['x'][:, None])).sum().abs()
        return {'l': square(model, batch) + (zero.sqrt() if batch['progress'] > .8 else zero)}
    with pytest.raises(FloatingPointError, match='is not finite after step 8'):
        train_numbers(tmp_path, losses, ema=ema)
    assert not (tmp_path/'weights.safetensors').exists()


def test_a_statistic_that_overflowed_once(tmp_path):
    "The losses do not show it, as a training does not read it."
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.BatchNorm1d(1))
    def losses(model, batch):
        if batch['progress'] == .25:
            model[1].running_var.fill_(float('inf'))
        return {'l': square(model, batch)}
    with pytest.raises(FloatingPointError, match='1.running_var is not finite'):
        train_numbers(tmp_path, losses, model)


def test_a_network_may_have_infinities_from_the_start(tmp_path):
    model = torch.nn.Linear(1, 1)
    model.register_buffer('mask', torch.tensor(-torch.inf))
    train_numbers(tmp_path, lambda model, batch: {'l': square(model, batch)}, model)
    assert (tmp_path/'weights.safetensors').is_file()


@pytest.mark.parametrize('error', [AssertionError(), ValueError('\n'), KeyError('model\nmore')])
def test_a_checkpoint_error_without_words(tmp_path, error):
    class Refusing(torch.nn.Linear):
        def load_state_dict(self, *args, **options): raise error
    torch.save({'model': {}}, tmp_path/'checkpoint.pt')
    words = str(error).strip().split('\n')[0] or type(error).__name__
    with pytest.raises(DataError, match='cannot be continued from') as found:
        load_checkpoint(tmp_path/'checkpoint.pt', Refusing(1, 1), None, None)
    assert f'({words})' in str(found.value)


def test_batches_are_a_permutation_each_epoch():
    steps = list(Batches(10, 3, 4, seed=1))
    assert len(steps) == len(Batches(10, 3, 4)) == 12
    for e in range(4):
        seen = [i for s in steps[3*e:3*e + 3] for epoch, i in s]
        assert len(set(seen)) == 9
        assert {epoch for s in steps[3*e:3*e + 3] for epoch, _ in s} == {e}


def test_a_batch_has_at_most_all_images():
    assert [len(b) for b in Batches(16, 32, 2)] == [16, 16]
    with pytest.raises(ValueError, match='no images'):
        Batches(0, 32, 1)


def test_no_epoch_is_no_step(scenes, tmp_path):
    "The weights are written as they begin."
    assert Batches(10, 4, 0).steps == 0 and Batches(10, 4, 1e-9).steps == 1
    torch.manual_seed(0)
    config, data = Config.from_flat(epochs=0, crop=64, target=32), TagFolder(scenes)
    train_cam(tmp_path, Inputs({}, {'train': data}), config, find_method('seam'))
    torch.manual_seed(0)
    begun = make_camnet(config, len(data.classes), find_method('seam')).state_dict()
    found = read_weights(tmp_path/'weights.safetensors')
    assert all(torch.equal(found[k], v) for k, v in begun.items())
    assert read_log(tmp_path/'log.jsonl') == []


@pytest.mark.parametrize('n, least, steps', [(60, 300, 300), (6000, 300, 750), (3, 7, 7)])
def test_a_small_folder_is_seen_more_often(n, least, steps):
    batches = Batches(n, 8, 1, min_steps=least)
    assert len(list(batches)) == batches.steps == steps


@pytest.mark.parametrize('spoil, words', [
    (lambda s: s.pop('conv3.0.0.weight'), 'lacks the tensor conv3.0.0.weight'),
    (lambda s: s.update(extra=torch.zeros(1)), 'extra'),
    (lambda s: s.update({'conv3.0.0.weight': torch.zeros(1)}), 'conv3.0.0.weight as')])
def test_weights_that_do_not_fit_are_named(spoil, words, tmp_path):
    state = Tiny().state_dict()
    spoil(state)
    torch.save(state, tmp_path/'w.pt')
    with pytest.raises(DataError, match=words):
        load_weights(Tiny(), tmp_path/'w.pt')


def test_weights_run_no_code(tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save({'a': Evil()}, tmp_path/'evil.pt')
    with pytest.raises(DataError, match='evil.pt'):
        read_weights(tmp_path/'evil.pt')
    assert not (tmp_path/'ran').exists()


# Files that are no weights.

def pickled(path): torch.save({'a': torch.nn.Conv2d(1, 1, 1)}, path)

NO_WEIGHTS = {  # what a download left behind, and words about it
    'a web page': (b'<!DOCTYPE html><html>Too many downloads</html>', 'web page'),
    'a web page with a byte-order mark': (b'\xef\xbb\xbf\n<html>Not found</html>', 'web page'),
    'XML of a bucket': (b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', 'XML'),
    'a pointer of LFS':
        (b'version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n', 'git lfs pull'),
    'nothing': (b'', 'it is empty'),
    'text': (b'{"message": "Not Found"}', 'damaged or of another format'),
    'zeros': (b'\0'*5000, 'damaged or of another format'),
    'a whole network': (pickled, 'more than tensors'),
}


@pytest.mark.parametrize('ending', ['pth', 'safetensors'])
@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_files_that_are_no_weights_are_named(tmp_path, name, ending):
    "The reason is said, and never torch's advice to run what is in the file."
    content, words = NO_WEIGHTS[name]
    path = tmp_path/f'w.{ending}'
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    if name == 'a whole network' and ending == 'safetensors':
        words = 'damaged or of another format'
    with pytest.raises(DataError, match=words) as e:
        read_weights(path)
    assert 'w.' in str(e.value) and '\n' not in str(e.value)
    assert 'weights_only' not in str(e.value) and 'trust' not in str(e.value)
    if ending == 'safetensors':
        with pytest.raises(DataError, match=words):
            conversion_record(path)


@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_torchvisions_file_that_is_no_weights(tmp_path, monkeypatch, name):
    "A file that a proxy put into the cache."
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    content, words = NO_WEIGHTS[name]
    path = tmp_path/'hub'/'checkpoints'/'resnet50-0676ba61.pth'
    path.parent.mkdir(parents=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=words) as e:
        torchvision_state('resnet50', 'IMAGENET1K_V1')
    assert str(path) in str(e.value) and 'weights_only' not in str(e.value)


@pytest.mark.parametrize('name', NO_WEIGHTS)
def test_a_checkpoint_that_is_none(tmp_path, name):
    content, _ = NO_WEIGHTS[name]
    path = tmp_path/'checkpoint.pt'
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    with pytest.raises(DataError, match='checkpoint.pt cannot be continued.*: delete it') as e:
        load_checkpoint(path, model, optimizer, None)
    assert 'weights_only' not in str(e.value) and '\n' not in str(e.value)


# Machines that have too little of something.

class Large(torch.utils.data.Dataset):
    "Items of 400 kB, of which some are at fault."
    def __init__(self, fault=None): self.fault = fault
    def __len__(self): return 8
    def __getitem__(self, key):
        if self.fault and key[1] == 3:
            self.fault()
        return {'x': torch.zeros(100_000)}


def raise_data_error(): raise DataError('a.jpg cannot be read as an image: replace it.')

def die(): os.kill(os.getpid(), signal.SIGKILL)

def bus_error(): os.kill(os.getpid(), signal.SIGBUS)

def other_error(): raise RuntimeError('shapes differ')


def fit_large(out, data, workers=1, width=1):
    model = torch.nn.Linear(100_000, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=.1)
    def losses(model, batch): return {'a': model(batch['x']).mean()}
    fit(model, losses, data, optimizer, out, epochs=1, batch_size=2, workers=workers, device='cpu')


@pytest.fixture
def small_files():
    "Files end at 50 kB, in shared memory as well, as on a full disk."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_too_little_shared_memory_is_said(tmp_path, small_files):
    with pytest.raises(DataError, match='too little shared memory .*MB.*set workers to 0'):
        fit_large(tmp_path, Large())


@pytest.mark.parametrize('fault, words', [
    (raise_data_error, '^a.jpg cannot be read as an image: replace it.$'),
    (bus_error, 'shared memory .*/dev/shm has .*set workers to 0'),
    (die, 'was killed, perhaps as memory ran out.*set workers to 0'),
])
def test_an_error_in_a_process_that_loads_images_is_a_sentence(tmp_path, fault, words):
    with pytest.raises(DataError, match=words) as e:
        fit_large(tmp_path, Large(fault))
    assert '\n' not in str(e.value)


def test_another_error_in_such_a_process_stays(tmp_path):
    with pytest.raises(RuntimeError, match='shapes differ'):
        fit_large(tmp_path, Large(other_error))


def test_a_full_disk_while_training_is_said(tmp_path, small_files):
    "The checkpoint holds 400 kB; and a log that cannot grow."
    with pytest.raises(WriteError, match='checkpoint.pt cannot be written, the disk'):
        fit_large(tmp_path, Large(), workers=0)
    assert [p.name for p in tmp_path.iterdir()] == ['log.jsonl']
    (tmp_path/'log.jsonl').write_text('{"step": 0}\n'*4166)
    with pytest.raises(WriteError, match='log.jsonl cannot be written, the disk'):
        fit_large(tmp_path, Large(), workers=0)
