"""Grids of runs: each run is counted once.

With killed drivers, kernels and workers, failing runs, parallel drivers, foreign folders, records.
"""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
import nbformat
import pytest
import rich.console
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st
from ppc import sweeps
from ppc.data import DataError
from ppc.sweeps import (
    grid,
    local_engine,
    read_records,
    read_values,
    run_name,
    run_one,
    runs,
    summary_line,
    sweep,
    sweep_state,
    time_left,
    write_records,
)

pytestmark = pytest.mark.slow

BOOK = Path(__file__).parent.parent/'nbs'
# processes that can be killed, and have imported the package already
FRESH = get_context('forkserver')
FRESH.set_forkserver_preload(['ppc.sweeps'])

PARAMETERS = """
out: str = ''
k: int = 0
seed: int = 0
lr: float = 1e-3
options: dict = {}
steps: int = 3
block: str = ''   # fails as long as this file is there
# once, after the second step: 'kill' the kernel, or 'hang' in a call that blocks all threads
trouble: str = ''"""

# As ppc.pipeline.run: one lock, a checkpoint for each step, metrics.json last and in one step.
# It notes what it does, and after its second step waits as long as there is a file wait-<k>.
WORK = """
import ctypes, json, os, random, signal, time
from pathlib import Path
from filelock import FileLock
out = Path(out)

def note(what):
    with open(out/'log.txt', 'a') as f:
        f.write(f'{os.getpid()} {os.getppid()} {what}\\n')

def write(path, value):
    text = json.dumps(value)
    with open(out/'.part', 'w') as f:
        f.write(text[:5])
        f.flush()
        time.sleep(.05)
        f.write(text[5:])
    os.replace(out/'.part', path)

with FileLock(out/'.lock', timeout=0):
    note(f'begin {os.getcwd()} {os.environ.get("OMP_NUM_THREADS")}')
    if block and Path(block).exists():
        raise ValueError('This is a long story.\\nThe file is in the way.')
    checkpoint = out/'checkpoint.json'
    found = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
    while len(found) < steps:
        note(f'step {len(found)}')
        found.append(random.Random(f'{k} {seed} {len(found)}').random())
        write(checkpoint, found)
        if len(found) != 2:
            continue
        note('waits')
        while Path(f'wait-{k}').exists():
            time.sleep(.02)
        if trouble == 'kill':
            os.kill(os.getpid(), signal.SIGKILL)
        if trouble == 'hang':
            ctypes.PyDLL(None).sleep(4)
    parameters = {'k': k, 'seed': seed, 'lr': lr, 'options': options, 'steps': steps}
    miou = sum(found)/steps
    write(out/'metrics.json', {'miou': miou, 'seconds': time.time(), 'parameters': parameters})"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A notebook in the working directory that mimics a run."
    cells = [nbformat.v4.new_code_cell(source) for source in (PARAMETERS, WORK, "note('end')")]
    cells[0].metadata['tags'] = ['parameters']
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python'}}
    book = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(book, tmp_path/'toy.ipynb')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TQDM_DISABLE', '1')
    return 'toy.ipynb'


def noted(folder, what):
    "The words that follow `what` in the notes of a run."
    log = Path(folder)/'log.txt'
    lines = log.read_text().splitlines() if log.exists() else []
    return [line.split(what, 1)[1].strip() for line in lines if what in line]


def pids(folder):
    """The kernels of a run in the order of their notes.

    Kernels that worked at the same time would alternate.
    """
    found = [line.split()[0] for line in (Path(folder)/'log.txt').read_text().splitlines()]
    return [p for i, p in enumerate(found) if i == 0 or found[i - 1] != p]


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.02)


def alive(pid):
    "Whether a process exists and is no zombie."
    try:
        if Path('/proc').exists():
            state = Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0]
            return state != 'Z'
        os.kill(int(pid), 0)
        return True
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def held(*ks):
    "Stop runs with these k after their second step while the block runs."
    for k in ks:
        Path(f'wait-{k}').touch()
    try:
        yield
    finally:
        for k in ks:
            Path(f'wait-{k}').unlink()


def driver(*arguments, **parameters):
    "A process that runs a sweep."
    process = FRESH.Process(target=sweep, args=arguments, kwargs=parameters, daemon=True)
    process.start()
    return process


def without_times(found):
    "What two sweeps must have in common."
    return [(r['name'], r['settings'], {k: v for k, v in r['metrics'].items() if k != 'seconds'})
            for r in found]


# --- names ------------------------------------------------------------------------------------

TEXT = st.text('aA1,=/-. "é', max_size=3)
NUMBERS = st.booleans() | st.integers() | st.floats(allow_nan=False)
LISTS = st.lists(st.integers() | TEXT, max_size=2)
DICTS = st.dictionaries(TEXT, st.integers(), max_size=2)
VALUES = st.none() | NUMBERS | TEXT | LISTS | DICTS
SETTINGS = st.dictionaries(st.sampled_from(['k', 'seed', 'options', 'data']), VALUES)


@given(SETTINGS, SETTINGS)
def test_a_name_is_a_file_name_of_one_run_alone(a, b):
    name = run_name(a)
    assert re.fullmatch(r'[A-Za-z0-9_.,=+-]{1,100}', name) and name[0] not in '.-'
    assert name == run_name(dict(reversed(a.items()))) == run_name(json.loads(json.dumps(a)))
    one, other = (json.dumps(x, sort_keys=True) for x in (a, b))   # in Python 1 == 1.0 == True
    assert (run_name(b) == name) == (one == other)


def test_a_grid_is_every_combination():
    found = grid(k=[0, 4, 8], seed=[0, 1], reading=['paper'])
    assert len(found) == 6
    assert found[:2] == [dict(k=0, seed=seed, reading='paper') for seed in (0, 1)]
    assert grid() == [{}] and grid(k=[]) == []


@pytest.mark.parametrize('item, value', [
    ('k=0,4,8', [0, 4, 8]),
    ('seed=0', [0]),
    ('weights=', ['']),
    ('weights="",hub', ['', 'hub']),
    ('methods=[cam],[seam,seam+ppc]', [['cam'], ['seam', 'seam+ppc']]),
    ('options={},{grid: 8}', [{}, {'grid': 8}]),
    ('options={},{"grid": 8}', [{}, {'grid': 8}]),
    ('data=runs/a=b', ['runs/a=b']),
    ('crf=true,false', [True, False])])
def test_values_are_the_inside_of_a_list(item, value):
    assert read_values([item]) == {item.split('=')[0]: value}


@pytest.mark.parametrize('item', ['k', 'k=[0', 'k=0]', 'k={'])
def test_what_is_no_value(item):
    with pytest.raises(ValueError, match=re.escape(f'-p {item}')):
        read_values([item])


# --- before anything starts -------------------------------------------------------------------

@pytest.mark.parametrize('settings, common, words', [
    (dict(kk=0), {}, "no parameter 'kk': did you mean 'k'"),
    ({}, dict(sed=0), "did you mean 'seed'"),
    (dict(colour='red'), {}, "no parameter 'colour'\\."),
    (dict(lr='1e-3'), {}, 'lr is .1e-3., it should be of type float'),
    (dict(k=True), {}, 'k is True'),
    ({}, dict(options=[]), 'type dict'),
    (dict(out='x'), {}, 'only the sweep'),
    ({}, dict(k=None), 'k is None')])
def test_wrong_parameters_start_nothing(toy, settings, common, words, monkeypatch):
    monkeypatch.setattr(sweeps, 'run_one', None)
    with pytest.raises(ValueError, match=words):
        sweep(toy, [{'seed': 0}, settings], 'runs', **common)
    assert not Path('runs').exists()


def test_a_notebook_without_out_is_no_run(toy):
    book = nbformat.read(toy, 4)
    book.cells[0].source = 'k: int = 0'
    nbformat.write(book, toy)
    with pytest.raises(ValueError, match='must have a parameter out'):
        sweep(toy, grid(k=[1]), 'runs')


@pytest.mark.parametrize('file', ['settings.json', 'config.json', 'metrics.json'])
def test_a_folder_of_something_else_is_refused(toy, file, monkeypatch):
    "Whether the folder or the call has the other parameter; and a damaged record is named."
    monkeypatch.setattr(sweeps, 'run_one', None)
    folder = Path('runs/k=1')
    folder.mkdir(parents=True)
    made = {'k': 1, 'seed': 0, 'lr': 2e-3, 'steps': 3}
    content = {'parameters': made} if file == 'metrics.json' else made
    (folder/file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r'k=1 was made with lr = 0.002, now lr = 0.001'):
        sweep(toy, grid(k=[1]), 'runs')
    with pytest.raises(ValueError, match=r'seed = 0, now seed = 5'):
        sweep(toy, grid(k=[1]), 'runs', lr=2e-3, seed=5)
    (folder/file).write_text('{"k"')
    with pytest.raises(DataError, match=f'{file} is damaged'):
        sweep(toy, grid(k=[1]), 'runs')
    assert [p.name for p in folder.iterdir()] == [file]


# --- runs -------------------------------------------------------------------------------------

def copy_records(root, other):
    "Copy the two files of each run that make its record."
    def others(folder, names):
        return [n for n in names if '=' not in n and n not in ('settings.json', 'metrics.json')]
    shutil.copytree(root, other, ignore=others)


def test_done_once_and_never_half_seen(toy):
    """A run that is done is not done again; two files are enough to recognise it.

    A reader that looks all the time sees whole records only.
    """
    seen, stop = [], threading.Event()

    def look():
        while not stop.is_set():
            seen.append(len(runs('runs')))

    watcher = threading.Thread(target=look)
    watcher.start()
    settings = grid(k=[0, 8], options=[{}]) + [dict(k=0, options={})]
    outcomes = sweep(toy, settings, 'runs', seed=3)
    stop.set()
    watcher.join()
    first, second = (run_name(s) for s in settings[:2])
    assert outcomes == [(first, 'done'), (second, 'done')]
    assert {0, 1} <= {*seen}
    found = runs('runs')
    assert [r['settings'] for r in found] == settings[:2]
    assert found[0]['metrics']['parameters']['seed'] == 3
    book = nbformat.read(f'runs/{first}/run.ipynb', 4)
    assert book.cells[1].source.count('seed = 3') and noted(f'runs/{first}', 'end')
    assert not list(Path('runs').glob('*/*.part*'))

    (Path('runs')/first/'.metrics.77.part.json').write_text('{"mi')
    copy_records('runs', 'copy')
    for root in ('runs', 'copy'):
        assert sweep(toy, settings, root, seed=3) == outcomes
        assert without_times(runs(root)) == without_times(found)
    assert len(noted(f'runs/{first}', 'begin')) == 1
    assert not Path(f'copy/{first}/log.txt').exists()
    with pytest.raises(ValueError, match='seed = 3, now seed = 0'):
        sweep(toy, settings, 'copy')
    (Path('copy')/first/'metrics.json').write_text('{"mi')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        runs('copy')

    # as if the driver had been killed between the record and the last cell, with the pictures
    os.rename(f'runs/{first}/run.ipynb', f'runs/{first}/run.part.ipynb')
    assert sweep_state('runs', settings).state[0] == 'waiting'
    assert without_times(runs('runs')) == without_times(found)
    assert sweep(toy, settings, 'runs', seed=3) == outcomes
    assert sweep_state('runs', settings).state[0] == 'done'
    assert len(noted(f'runs/{first}', 'end')) == 2
    assert noted(f'runs/{first}', 'step') == ['0', '1', '2']


def test_a_failing_cell_concerns_its_run_alone(toy):
    "The outcome is its last line; it is tried once more, and at each call until it succeeds."
    Path('wall').write_text('')
    settings = [dict(block='wall'), dict(k=1)]
    outcomes = sweep(toy, settings, 'runs')
    assert outcomes == [('block=wall', 'The file is in the way.'), ('k=1', 'done')]
    failed = Path('runs/block=wall')
    assert len(noted(failed, 'begin')) == 2 and len(noted('runs/k=1', 'begin')) == 1
    assert 'a long story' in (failed/'failed.txt').read_text()
    assert 'in the way' in (failed/'run.part.ipynb').read_text()
    table = sweep_state('runs', settings)
    assert [*table.state] == ['failed', 'done'] and table.message[0] == 'The file is in the way.'
    assert [r['name'] for r in runs('runs')] == ['k=1']
    assert sweep(toy, settings, 'runs', retries=0)[0][1] == 'The file is in the way.'
    assert len(noted(failed, 'begin')) == 3
    Path('wall').unlink()
    assert [o for _, o in sweep(toy, settings, 'runs', retries=0)] == ['done', 'done']
    assert not (failed/'failed.txt').exists()
    assert [*sweep_state('runs', settings).state] == ['done', 'done']
    assert len(noted('runs/k=1', 'begin')) == 1


def test_a_notebook_that_leaves_no_record_has_failed(toy):
    book = nbformat.read(toy, 4)
    book.cells[1].source = ''
    nbformat.write(book, toy)
    book.cells[2].source = ''
    nbformat.write(book, toy)
    assert 'without a metrics.json' in sweep(toy, grid(k=[1]), 'runs', retries=0)[0][1]


def test_a_killed_kernel_goes_on_from_its_checkpoint(toy):
    outcomes = sweep(toy, grid(k=[1]), 'runs', trouble='kill', retries=0)
    assert 'died' in outcomes[0][1].lower() and noted('runs/k=1', 'step') == ['0', '1']
    assert sweep(toy, grid(k=[1]), 'runs', trouble='kill', retries=0) == [('k=1', 'done')]
    assert noted('runs/k=1', 'step') == ['0', '1', '2'] and len(noted('runs/k=1', 'begin')) == 2


# --- records ----------------------------------------------------------------------------------

RECORDS = [
    {'name': 'k=0', 'settings': {'k': 0},
     'metrics': {'miou': .1 + .2, 'seconds': 7.5, 'parameters': {'k': 0, 'lr': 1e-3}}},
    {'name': 'k=1', 'settings': {'k': 1},
     'metrics': {'miou': None, 'seconds': 9, 'parameters': {'k': 1, 'lr': 1e-3}}}]


def put_folder(root, record):
    folder = Path(root)/record['name']
    folder.mkdir(parents=True)
    for part in ('settings', 'metrics'):
        (folder/f'{part}.json').write_text(json.dumps(record[part]))


def put_file(file, *records):
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text(''.join(json.dumps(r) + '\n' for r in records))


def test_a_folder_becomes_a_file_and_every_number_stays(tmp_path):
    for record in reversed(RECORDS):
        put_folder(tmp_path/'k', record)
    (tmp_path/'k'/'k=2').mkdir()   # not done: it is no record
    file = write_records(tmp_path/'k')
    assert file == tmp_path/'k.jsonl' and [*tmp_path.iterdir()] != [file]
    assert json.dumps(read_records(file)) == json.dumps(RECORDS)   # also the order of names
    shutil.rmtree(tmp_path/'k')
    assert runs(tmp_path/'k') == runs(file) == runs(str(file)) == RECORDS
    assert write_records(file, tmp_path/'again'/'k.jsonl').read_text() == file.read_text()
    assert not list(tmp_path.glob('**/*.part*'))


def test_where_there_is_nothing_no_file_is_written(tmp_path):
    assert runs(tmp_path/'k') == runs(tmp_path/'k.jsonl') == read_records(tmp_path/'k.jsonl') == []
    with pytest.raises(DataError, match='k holds no finished run'):
        write_records(tmp_path/'k')
    assert not [*tmp_path.iterdir()]


def test_a_file_and_a_folder_are_one_sweep(tmp_path):
    "A run that both have is that of the folder; runs are sorted by name."
    put_file(tmp_path/'k.jsonl', *RECORDS)
    put_folder(tmp_path/'k', {'name': 'k=10', 'settings': {'k': 10}, 'metrics': {'miou': 3}})
    put_folder(tmp_path/'k', {**RECORDS[1], 'metrics': {'miou': 4}})
    found = runs(tmp_path/'k')
    assert [r['name'] for r in found] == ['k=0', 'k=1', 'k=10']
    assert [r['metrics']['miou'] for r in found] == [.1 + .2, 4, 3]
    write_records(tmp_path/'k')
    assert runs(tmp_path/'k.jsonl') == found


@pytest.mark.parametrize('line, words', [
    ('{"name": "k=1", "sett', r'line 2, is damaged \('),
    ('<<<<<<< HEAD', r'line 2, is damaged \('),
    ('\xe9'.encode('latin1'), r'line 2, is damaged \('),
    ('[1, 2]', 'line 2, is no record'),
    ('{"name": "k=1", "metrics": {}}', 'line 2, is no record')])
def test_a_damaged_line_is_named(toy, line, words):
    line = line if isinstance(line, bytes) else line.encode()
    Path('k.jsonl').write_bytes(json.dumps(RECORDS[0]).encode() + b'\n' + line + b'\n')
    readers = (lambda: runs('k'), lambda: sweep_state('k', grid(k=[0])), lambda: write_records('k'),
               lambda: sweep(toy, grid(k=[0]), 'k'))
    for read in readers:
        with pytest.raises(DataError, match=rf'k\.jsonl, {words}'):
            read()
    assert not Path('k').exists()


def test_a_recorded_run_is_done(toy):
    "What stands in the file is not run again, and leaves no folder; the rest of the grid is run."
    put_file('k.jsonl', RECORDS[1])
    settings = grid(k=[0, 1])
    assert [*sweep_state('k', settings).state] == ['waiting', 'done']
    assert sweep_state('k', settings).seconds[1] == 9
    assert sweep(toy, settings[1:], 'k') == [('k=1', 'done')] and not Path('k').exists()
    assert sweep(toy, settings, 'k') == [('k=0', 'done'), ('k=1', 'done')]
    assert not Path('k/k=1').exists() and noted('k/k=0', 'end')
    assert [r['name'] for r in runs('k')] == ['k=0', 'k=1'] and runs('k')[1] == RECORDS[1]
    write_records('k')
    shutil.rmtree('k')
    assert sweep(toy, settings, 'k') == [('k=0', 'done'), ('k=1', 'done')]
    assert not Path('k').exists()


def test_a_record_of_something_else_is_refused(toy, monkeypatch):
    monkeypatch.setattr(sweeps, 'run_one', None)
    put_file('k.jsonl', *RECORDS)
    words = r'lr = 0.001, now lr = 0.01: use another root, or delete its line in k\.jsonl'
    with pytest.raises(ValueError, match=f'k=1 was made with {words}'):
        sweep(toy, grid(k=[2, 1]), 'k', lr=.01)
    assert not Path('k').exists()


def test_a_record_keeps_its_words_and_is_read_in_those_of_today(toy, monkeypatch):
    "After a parameter was renamed, the file keeps the old name and readers see the new one."
    def modern(parameters):
        return {{'width': 'k'}.get(name, name): value for name, value in parameters.items()}

    def record(name):
        metrics = {'parameters': {name: 1, 'lr': 1e-3}}
        return {'name': 'width=1', 'settings': {name: 1}, 'metrics': metrics}

    old = record('width')
    put_file('k.jsonl', old)
    put_folder('made', old)
    monkeypatch.setattr(sweeps, 'modern', modern)
    for root in ('k', 'made'):
        assert runs(root) == [record('k')]
        assert read_records(write_records(root)) == [old]
    assert sweep(toy, grid(k=[1]), 'k') == [('k=1', 'done')] and not Path('k').exists()
    with pytest.raises(ValueError, match='now lr = 0.01'):
        sweep(toy, grid(k=[1]), 'k', lr=.01)


# --- drivers ----------------------------------------------------------------------------------

def test_a_killed_driver_loses_its_running_cell(toy):
    settings = grid(k=[0, 1, 2])
    with held(1):
        killed = driver(toy, settings, 'runs')
        wait_until(lambda: noted('runs/k=1', 'waits'))
        assert [*sweep_state('runs', settings).state] == ['done', 'running', 'waiting']
        killed.kill()
        killed.join()
        assert [*sweep_state('runs', settings).state] == ['done', 'waiting', 'waiting']
        orphan, = pids('runs/k=1')
        wait_until(lambda: not alive(orphan))   # it has seen that its parent has gone
    outcomes = sweep(toy, settings, 'runs', retries=0)
    assert outcomes == [('k=0', 'done'), ('k=1', 'done'), ('k=2', 'done')]
    assert [len(noted(f'runs/k={k}', 'begin')) for k in range(3)] == [1, 2, 1]
    assert noted('runs/k=1', 'step') == ['0', '1', '2']   # from the checkpoint


def test_a_kernel_that_outlives_its_driver_is_waited_for(toy):
    "In a call that blocks every thread it cannot notice the loss, and holds the run's own lock."
    killed = driver(toy, grid(k=[1]), 'runs', trouble='hang')
    wait_until(lambda: noted('runs/k=1', 'waits'))
    time.sleep(.2)
    killed.kill()
    killed.join()
    orphan, = pids('runs/k=1')
    time.sleep(1.5)
    assert alive(orphan)
    # without waiting, the lock would make it fail
    assert sweep(toy, grid(k=[1]), 'runs', trouble='hang', retries=0) == [('k=1', 'done')]
    assert len(pids('runs/k=1')) == 2
    assert noted('runs/k=1', 'step')[:3] == ['0', '1', '2']   # the orphan may have begun the third
    wait_until(lambda: not alive(orphan))


def test_parallel_drivers_share_the_work(toy):
    settings = grid(k=[0, 1, 2])
    with ProcessPoolExecutor(2, FRESH) as two:
        with held(0):
            both = [two.submit(sweep, toy, settings, 'runs') for _ in range(2)]
            wait_until(lambda: noted('runs/k=2', 'end'))   # by the driver that passed the first run
        found = [dict(f.result()) for f in both]
    assert sorted(f['k=0'] for f in found) == ['done', 'elsewhere'] and len(runs('runs')) == 3
    for k in range(3):
        assert len(noted(f'runs/k={k}', 'begin')) == 1
        assert 'done' in {f[f'k={k}'] for f in found} <= {'done', 'elsewhere'}


def interrupted():
    # tests that a shell runs in the background ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with local_engine(2) as two:
        sweep('toy.ipynb', grid(k=[0, 1, 2]), 'runs', two)


def waiting():
    return all(noted(f'runs/k={k}', 'waits') for k in (0, 1))


def interrupted_elsewhere():
    "A signal may reach any thread of a process; then a wait in the main thread goes on."
    def strike():
        wait_until(waiting)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        threading.Event().wait()

    threading.Thread(target=strike, daemon=True).start()
    interrupted()


@pytest.mark.parametrize('target', [interrupted, interrupted_elsewhere])
def test_ctrl_c_ends_the_driver_and_its_kernels(toy, target):
    process = FRESH.Process(target=target, daemon=True)
    with held(0, 1):
        process.start()
        wait_until(waiting)
        if target is interrupted:
            os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 1 and not noted('runs/k=2', 'begin')
        wait_until(lambda: not any(alive(pids(f'runs/k={k}')[0]) for k in (0, 1)))
    assert not runs('runs')


def test_the_command_is_killed_and_called_again(toy):
    Path('common.yaml').write_text('out: elsewhere\nlr: 0.01\n')
    Path('wall').touch()
    words = f'sweep {toy} -f common.yaml -p k=0,1 -p block=none,wall --out runs'
    call = dict(args=[Path(sys.executable).parent/'ppc', *words.split()], text=True)
    waiting = Path('runs')/run_name(dict(k=1, block='none'))
    with held(1), subprocess.Popen(**call) as killed:
        wait_until(lambda: noted(waiting, 'waits'))
        killed.kill()
    assert [r['settings'] for r in runs('runs')] == [{'k': 0, 'block': 'none'}]
    found = subprocess.run(**call, capture_output=True)
    assert found.returncode == 1 and found.stdout.startswith('2 done, 2 failed')
    assert found.stderr.count('The file is in the way.') == 2
    assert noted(waiting, 'step') == ['0', '1', '2']   # from the checkpoint
    Path('wall').unlink()
    found = subprocess.run(**call, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, '4 done; they are in runs\n', '')
    assert [r['metrics']['parameters']['lr'] for r in runs('runs')] == [.01]*4


# --- engines ----------------------------------------------------------------------------------

def test_threads_share_the_cores(toy, monkeypatch):
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    monkeypatch.setattr(sweeps.torch, 'get_num_threads', lambda: 6)
    with local_engine(2) as two:
        assert sweep(toy, grid(k=[0, 1]), 'runs', two) == [('k=0', 'done'), ('k=1', 'done')]
    for k in (0, 1):
        assert noted(f'runs/k={k}', 'begin')[0].split()[-1] == '3'
    assert 'OMP_NUM_THREADS' not in os.environ
    monkeypatch.setenv('OMP_NUM_THREADS', '5')
    with local_engine(2):
        assert os.environ['OMP_NUM_THREADS'] == '5'
    assert os.environ['OMP_NUM_THREADS'] == '5'


def test_processes_elsewhere_keep_relative_paths(toy, tmp_path):
    Path('wall').write_text('')
    with ProcessPoolExecutor(1, FRESH, os.chdir, ('/',)) as pool:
        outcomes = sweep(toy, grid(block=['wall', 'gone']), 'runs', pool.map, retries=0)
    assert outcomes == [('block=wall', 'The file is in the way.'), ('block=gone', 'done')]
    assert noted('runs/block=gone', 'begin')[0].split()[0] == os.getcwd()


def test_dask_loses_a_worker(toy, tmp_path):
    """One of two worker processes is killed in the middle of a run.

    Everything is done, with the numbers of a serial sweep.
    """
    import dask
    from dask.distributed import Client, LocalCluster
    settings, found = grid(k=[0, 1, 2]), []
    fresh = dask.config.set({'distributed.worker.multiprocessing-method': 'forkserver'})
    options = dict(threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path))
    with fresh, LocalCluster(2, **options) as cluster, Client(cluster) as client:
        engine = client.get_executor().map
        at_work = threading.Thread(
            target=lambda: found.extend(sweep(toy, settings, 'dask', engine)))
        with held(0):
            at_work.start()
            wait_until(lambda: noted('dask/k=0', 'waits'))
            worker = int(Path('dask/k=0/log.txt').read_text().split()[1])
            assert worker in client.run(os.getpid).values()
            os.kill(worker, signal.SIGKILL)
        at_work.join(60)
    assert found == [('k=0', 'done'), ('k=1', 'done'), ('k=2', 'done')]
    assert len(pids('dask/k=0')) == 2
    assert sweep(toy, settings, 'serial') == found
    assert without_times(runs('dask')) == without_times(runs('serial'))


# --- progress ---------------------------------------------------------------------------------

@pytest.fixture
def four(tmp_path):
    "Folders of four runs: done, at work, failed, not begun."
    content = {
        'k=0': {'metrics.json': '{"seconds": 100}'},
        'k=1': {'.began': '', '.sweep.lock': ''},
        'k=2': {'failed.txt': 'Why?\n[/red] because\n'},
        'k=3': {}}
    for name, files in content.items():
        (tmp_path/name).mkdir()
        for file, text in files.items():
            (tmp_path/name/file).write_text(text)
    os.utime(tmp_path/'k=1'/'.began', (time.time() - 30,)*2)
    with FileLock(tmp_path/'k=1'/'.sweep.lock'):
        yield tmp_path


def test_state_comes_from_the_folders(four):
    table = sweep_state(four, grid(k=[0, 1, 2, 3, 4]))
    assert [*table.state] == ['done', 'running', 'failed', 'waiting', 'waiting']
    assert table.message[2] == '[/red] because'
    assert table.seconds[0] == 100 and 30 <= table.seconds[1] < 60
    assert 240 < time_left(table) <= 270
    assert re.match('1 done, 1 running, 1 failed, 2 waiting, 0:04:[0-9]+ left', summary_line(table))
    assert time_left(table[1:]) is None and summary_line(table[2:4]) == '1 failed, 1 waiting'
    assert run_one(('none.ipynb', str(four/'k=1'), {})) == ('k=1', 'elsewhere')


@pytest.mark.parametrize('lines', [40, 3])
def test_a_terminal_shows_a_table(four, monkeypatch, lines):
    shown = io.StringIO()
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(sweeps, 'LINES', lines)
    console = rich.console.Console(file=shown, force_terminal=True, width=100)
    monkeypatch.setattr(sweeps, 'Console', lambda stderr: console)
    with sweeps.show_progress(four, grid(k=[0, 1, 2, 3]), .1):
        time.sleep(.3)
    summary = '1 done, 1 running, 1 failed, 1 waiting, 0:02:'
    for words in ('k=1', 'running', '[/red] because', summary):
        assert words in shown.getvalue()
    assert ('k=3' in shown.getvalue()) == (lines == 40)


def test_without_a_terminal_a_line_reports_each_change(four, monkeypatch, capfd):
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    with sweeps.show_progress(four, grid(k=[0, 1, 2, 3]), .1):
        time.sleep(.3)
        (four/'k=3'/'metrics.json').write_text('{"seconds": 60}')
        time.sleep(.3)
    assert capfd.readouterr().err.splitlines()[0] == 'k=3: done 0:01:00'
    monkeypatch.setenv('TQDM_DISABLE', '1')
    with sweeps.show_progress(four, grid(k=[0, 1, 2, 3]), .01):
        (four/'k=2'/'metrics.json').write_text('{}')
    assert not capfd.readouterr().err


# --- real runs --------------------------------------------------------------------------------

def test_real_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1')
    notebook, settings = BOOK/'50_run.ipynb', grid(seed=[0, 1])
    done = [('seed=0', 'done'), ('seed=1', 'done')]
    common = dict(methods=['cam'], scenes=12, closeups=32, batch_size=4, crop=64, target=32,
                  resize=[64, 96], crf=False, refine='none', segmenter='none')
    assert sweep(notebook, settings, tmp_path, **common) == done
    found = runs(tmp_path)
    for r in found:
        assert r['metrics']['seed_miou']['cam'] > 0
        assert r['metrics']['parameters']['seed'] == r['settings']['seed']
    assert (tmp_path/'seed=0'/'result.png').exists()
    assert sweep_state(tmp_path, settings).seconds.min() > 0
    by_default = {k: v for k, v in common.items() if k != 'batch_size'}
    for other in (dict(common, batch_size=8), by_default):
        with pytest.raises(ValueError, match='batch_size = 4, now batch_size = 8'):
            sweep(notebook, settings, tmp_path, **other)
    assert sweep(notebook, settings, tmp_path, **common, workers=1, device='cpu') == done
    assert without_times(runs(tmp_path)) == without_times(found)
