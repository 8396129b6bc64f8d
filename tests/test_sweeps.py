"Grids of runs: killed drivers, kernels and workers, runs that fail, drivers side by side, folders of something else; each run is counted once."
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
    check_folder,
    grid,
    local_engine,
    read_values,
    run_name,
    run_one,
    runs,
    summary_line,
    sweep,
    sweep_state,
    time_left,
)

BOOK = Path(__file__).parent.parent/'nbs'
FRESH = get_context('forkserver')   # processes that can be killed, and have imported the package already
FRESH.set_forkserver_preload(['ppc.sweeps'])

PARAMETERS = """
out: str = ''
k: int = 0
seed: int = 0
lr: float = 1e-3
options: dict = {}
steps: int = 3
block: str = ''   # fails as long as this file is there
trouble: str = '' # once, after the second step: 'kill' the kernel, or 'hang' in a call that lets no other thread go on"""

# As ppc.pipeline.run does: one lock, a checkpoint for each step, metrics.json last and in one step. It notes what it does,
# and after its second step waits as long as there is a file wait-<k>.
WORK = """
import ctypes, json, os, random, signal, time
from pathlib import Path
from filelock import FileLock
out = Path(out)

def note(what):
    with open(out/'log.txt', 'a') as f: f.write(f'{os.getpid()} {os.getppid()} {what}\\n')

def write(path, value):
    text = json.dumps(value)
    with open(out/'.part', 'w') as f:
        f.write(text[:5]); f.flush()
        time.sleep(.05)
        f.write(text[5:])
    os.replace(out/'.part', path)

with FileLock(out/'.lock', timeout=0):
    note(f'begin {os.getcwd()} {os.environ.get("OMP_NUM_THREADS")}')
    if block and Path(block).exists(): raise ValueError('This is a long story.\\nThe file is in the way.')
    found = json.loads((out/'checkpoint.json').read_text()) if (out/'checkpoint.json').exists() else []
    while len(found) < steps:
        note(f'step {len(found)}')
        found.append(random.Random(f'{k} {seed} {len(found)}').random())
        write(out/'checkpoint.json', found)
        if len(found) != 2: continue
        note('waits')
        while Path(f'wait-{k}').exists(): time.sleep(.02)
        if trouble == 'kill': os.kill(os.getpid(), signal.SIGKILL)
        if trouble == 'hang': ctypes.PyDLL(None).sleep(4)
    write(out/'metrics.json', {'miou': sum(found)/steps, 'seconds': time.time(), 'parameters': {'k': k, 'seed': seed, 'lr': lr, 'options': options, 'steps': steps}})"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A notebook in the working directory that mimics a run."
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={'tags': ['parameters']}), nbformat.v4.new_code_cell(WORK), nbformat.v4.new_code_cell("note('end')")]
    kernel = {'kernelspec': {'name': 'python3', 'language': 'python', 'display_name': 'Python'}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path/'toy.ipynb')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TQDM_DISABLE', '1')
    return 'toy.ipynb'


def noted(folder, what):
    "The words behind `what` in the notes of a run."
    lines = (Path(folder)/'log.txt').read_text().splitlines() if (Path(folder)/'log.txt').exists() else []
    return [line.split(what, 1)[1].strip() for line in lines if what in line]


def pids(folder):
    "The kernels of a run in the order of their notes: kernels that worked at the same time would alternate."
    found = [line.split()[0] for line in (Path(folder)/'log.txt').read_text().splitlines()]
    return [p for i, p in enumerate(found) if i == 0 or found[i - 1] != p]


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.02)


def alive(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z' if Path('/proc').exists() else not os.kill(int(pid), 0)
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def held(*ks):
    "Runs with these k go no further than their second step."
    for k in ks:
        Path(f'wait-{k}').touch()
    try:
        yield
    finally:
        for k in ks:
            Path(f'wait-{k}').unlink()


def driver(*arguments, **parameters):
    process = FRESH.Process(target=sweep, args=arguments, kwargs=parameters, daemon=True)
    process.start()
    return process


def plain(found):  # what two sweeps must have in common
    return [(r['name'], r['settings'], {k: v for k, v in r['metrics'].items() if k != 'seconds'}) for r in found]


# --- names --------------------------------------------------------------------------------------------------------------------

TEXT = st.text('aA1,=/-. "é', max_size=3)
VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | st.lists(st.integers() | TEXT, max_size=2) | st.dictionaries(TEXT, st.integers(), max_size=2)
SETTINGS = st.dictionaries(st.sampled_from(['k', 'seed', 'options', 'data']), VALUES)


@given(SETTINGS, SETTINGS)
def test_a_name_is_a_file_name_and_nobody_elses(a, b):
    name = run_name(a)
    assert re.fullmatch(r'[A-Za-z0-9_.,=+-]{1,100}', name) and name[0] not in '.-'
    assert name == run_name(dict(reversed(a.items()))) == run_name(json.loads(json.dumps(a)))
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)   # in Python 1 == 1.0 == True
    assert (run_name(b) == name) == same


def test_a_grid_is_every_combination():
    found = grid(k=[0, 4, 8], seed=[0, 1], reading=['paper'])
    assert len(found) == 6 and found[0] == dict(k=0, seed=0, reading='paper') and found[1] == dict(k=0, seed=1, reading='paper')
    assert grid() == [{}] and grid(k=[]) == []


@pytest.mark.parametrize('item, value', [
    ('k=0,4,8', [0, 4, 8]), ('seed=0', [0]), ('weights=', ['']), ('weights="",hub', ['', 'hub']), ('methods=[cam],[seam,seam+ppc]', [['cam'], ['seam', 'seam+ppc']]),
    ('options={},{grid: 8}', [{}, {'grid': 8}]), ('options={},{"grid": 8}', [{}, {'grid': 8}]), ('data=runs/a=b', ['runs/a=b']), ('crf=true,false', [True, False])])
def test_values_are_the_inside_of_a_list(item, value): assert read_values([item]) == {item.split('=')[0]: value}


@pytest.mark.parametrize('item', ['k', 'k=[0', 'k=0]', 'k={'])
def test_values_that_are_none(item):
    with pytest.raises(ValueError, match=re.escape(f'-p {item}')):
        read_values([item])


# --- before anything starts -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('settings, common, words', [
    (dict(kk=0), {}, "no parameter 'kk': did you mean 'k'"), ({}, dict(sed=0), "did you mean 'seed'"), (dict(colour='red'), {}, "no parameter 'colour'\\."),
    (dict(lr='1e-3'), {}, 'lr is .1e-3., it should be of type float'), (dict(k=True), {}, 'k is True'), ({}, dict(options=[]), 'type dict'), (dict(out='x'), {}, 'only the sweep'),
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
    "Whether it was told otherwise then, or is told otherwise now; and a damaged record is named."
    monkeypatch.setattr(sweeps, 'run_one', None)
    folder = Path('runs/k=1')
    folder.mkdir(parents=True)
    made = {'k': 1, 'seed': 0, 'lr': 2e-3, 'steps': 3}
    (folder/file).write_text(json.dumps({'parameters': made} if file == 'metrics.json' else made))
    with pytest.raises(ValueError, match=r'k=1 was made with lr = 0.002, now lr = 0.001'):
        sweep(toy, grid(k=[1]), 'runs')
    with pytest.raises(ValueError, match=r'seed = 0, now seed = 5'):
        sweep(toy, grid(k=[1]), 'runs', lr=2e-3, seed=5)
    (folder/file).write_text('{"k"')
    with pytest.raises(DataError, match=f'{file} is damaged'):
        sweep(toy, grid(k=[1]), 'runs')
    assert [p.name for p in folder.iterdir()] == [file]


# --- runs -----------------------------------------------------------------------------------------------------------------------

def test_done_once_and_never_half_seen(toy):
    "Somebody who looks all the time sees whole records only; what is done is not done again, and is recognised by two files."
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
    assert outcomes == [(first, 'done'), (second, 'done')] and {0, 1} <= {*seen}
    found = runs('runs')
    assert [r['settings'] for r in found] == settings[:2] and found[0]['metrics']['parameters']['seed'] == 3
    book = nbformat.read(f'runs/{first}/run.ipynb', 4)
    assert book.cells[1].source.count("seed = 3") and not list(Path('runs').glob('*/*.part*')) and noted(f'runs/{first}', 'end')

    (Path('runs')/first/'.metrics.77.part.json').write_text('{"mi')
    shutil.copytree('runs', 'copy', ignore=lambda d, names: [n for n in names if '=' not in n and n not in ('settings.json', 'metrics.json')])
    for root in ('runs', 'copy'):
        assert sweep(toy, settings, root, seed=3) == outcomes and plain(runs(root)) == plain(found)
    assert len(noted(f'runs/{first}', 'begin')) == 1 and not Path(f'copy/{first}/log.txt').exists()
    with pytest.raises(ValueError, match='seed = 3, now seed = 0'):
        sweep(toy, settings, 'copy')
    (Path('copy')/first/'metrics.json').write_text('{"mi')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        runs('copy')

    os.rename(f'runs/{first}/run.ipynb', f'runs/{first}/run.part.ipynb')   # as if the driver had been killed between the record and the last cell, with the pictures
    assert sweep_state('runs', settings).state[0] == 'waiting' and plain(runs('runs')) == plain(found)
    assert sweep(toy, settings, 'runs', seed=3) == outcomes and sweep_state('runs', settings).state[0] == 'done'
    assert len(noted(f'runs/{first}', 'end')) == 2 and noted(f'runs/{first}', 'step') == ['0', '1', '2']


def test_a_failing_cell_concerns_its_run_alone(toy):
    "Its last line is told, it is tried once more and at the next call, and when the cause has gone it is done."
    Path('wall').write_text('')
    settings = [dict(block='wall'), dict(k=1)]
    assert sweep(toy, settings, 'runs') == [('block=wall', 'The file is in the way.'), ('k=1', 'done')]
    assert len(noted('runs/block=wall', 'begin')) == 2 and len(noted('runs/k=1', 'begin')) == 1
    assert 'a long story' in Path('runs/block=wall/failed.txt').read_text() and 'in the way' in Path('runs/block=wall/run.part.ipynb').read_text()
    table = sweep_state('runs', settings)
    assert [*table.state] == ['failed', 'done'] and table.message[0] == 'The file is in the way.' and [r['name'] for r in runs('runs')] == ['k=1']
    assert sweep(toy, settings, 'runs', retries=0)[0][1] == 'The file is in the way.' and len(noted('runs/block=wall', 'begin')) == 3
    Path('wall').unlink()
    assert [o for _, o in sweep(toy, settings, 'runs', retries=0)] == ['done', 'done']
    assert not Path('runs/block=wall/failed.txt').exists() and [*sweep_state('runs', settings).state] == ['done', 'done'] and len(noted('runs/k=1', 'begin')) == 1


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


# --- drivers --------------------------------------------------------------------------------------------------------------------

def test_a_killed_driver_loses_its_running_cell(toy):
    settings = grid(k=[0, 1, 2])
    with held(1):
        killed = driver(toy, settings, 'runs')
        until(lambda: noted('runs/k=1', 'waits'))
        assert [*sweep_state('runs', settings).state] == ['done', 'running', 'waiting']
        killed.kill()
        killed.join()
        assert [*sweep_state('runs', settings).state] == ['done', 'waiting', 'waiting']
        orphan, = pids('runs/k=1')
        until(lambda: not alive(orphan))   # it has seen that its parent has gone
    assert sweep(toy, settings, 'runs', retries=0) == [('k=0', 'done'), ('k=1', 'done'), ('k=2', 'done')]
    assert [len(noted(f'runs/k={k}', 'begin')) for k in range(3)] == [1, 2, 1]
    assert noted('runs/k=1', 'step') == ['0', '1', '2']   # from the checkpoint


def test_a_kernel_that_outlives_its_driver_is_waited_for(toy):
    "In a call that blocks every thread it cannot notice that its parent has gone, and holds the run's own lock."
    killed = driver(toy, grid(k=[1]), 'runs', trouble='hang')
    until(lambda: noted('runs/k=1', 'waits'))
    time.sleep(.2)
    killed.kill()
    killed.join()
    orphan, = pids('runs/k=1')
    time.sleep(1.5)
    assert alive(orphan)
    assert sweep(toy, grid(k=[1]), 'runs', trouble='hang', retries=0) == [('k=1', 'done')]   # had it not waited, the lock would have made it fail
    assert len(pids('runs/k=1')) == 2 and noted('runs/k=1', 'step')[:3] == ['0', '1', '2']   # the orphan may still have begun the third
    until(lambda: not alive(orphan))


def test_drivers_side_by_side_share_the_work(toy):
    settings = grid(k=[0, 1, 2])
    with ProcessPoolExecutor(2, FRESH) as two:
        with held(0):
            both = [two.submit(sweep, toy, settings, 'runs') for _ in range(2)]
            until(lambda: noted('runs/k=2', 'end'))   # one is busy with the first run, the other passes by
        found = [dict(f.result()) for f in both]
    assert sorted(f['k=0'] for f in found) == ['done', 'elsewhere'] and len(runs('runs')) == 3
    for k in range(3):
        assert len(noted(f'runs/k={k}', 'begin')) == 1 and 'done' in {f[f'k={k}'] for f in found} <= {'done', 'elsewhere'}


def interrupted():
    signal.signal(signal.SIGINT, signal.default_int_handler)   # who starts the tests in the background of a shell has them ignore it
    with local_engine(2) as two:
        sweep('toy.ipynb', grid(k=[0, 1, 2]), 'runs', two)


def waiting(): return all(noted(f'runs/k={k}', 'waits') for k in (0, 1))

def interrupted_elsewhere():
    "A signal to a process may reach any of its threads; it then wakes nobody who waits in the main one."
    def strike():
        until(waiting)
        signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        threading.Event().wait()
    threading.Thread(target=strike, daemon=True).start()
    interrupted()


@pytest.mark.parametrize('target', [interrupted, interrupted_elsewhere])
def test_ctrl_c_ends_the_driver_and_its_kernels(toy, target):
    process = FRESH.Process(target=target, daemon=True)
    with held(0, 1):
        process.start()
        until(waiting)
        if target is interrupted:
            os.kill(process.pid, signal.SIGINT)
        process.join(30)
        assert process.exitcode == 1 and not noted('runs/k=2', 'begin')
        until(lambda: not any(alive(pids(f'runs/k={k}')[0]) for k in (0, 1)))
    assert not runs('runs')


def test_the_command_is_killed_and_called_again(toy):
    Path('common.yaml').write_text('out: elsewhere\nlr: 0.01\n')
    Path('wall').touch()
    call = dict(args=[Path(sys.executable).parent/'ppc', 'sweep', toy, '-f', 'common.yaml', '-p', 'k=0,1', '-p', 'block=none,wall', '--out', 'runs'], text=True)
    waiting = Path('runs')/run_name(dict(k=1, block='none'))
    with held(1), subprocess.Popen(**call) as killed:
        until(lambda: noted(waiting, 'waits'))
        killed.kill()
    assert [r['settings'] for r in runs('runs')] == [{'k': 0, 'block': 'none'}]
    found = subprocess.run(**call, capture_output=True)
    assert found.returncode == 1 and found.stdout.startswith('2 done, 2 failed') and found.stderr.count('The file is in the way.') == 2
    assert noted(waiting, 'step') == ['0', '1', '2']   # from the checkpoint
    Path('wall').unlink()
    found = subprocess.run(**call, capture_output=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, '4 done; they are in runs\n', '')
    assert [r['metrics']['parameters']['lr'] for r in runs('runs')] == [.01]*4


# --- engines --------------------------------------------------------------------------------------------------------------------

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
        assert sweep(toy, grid(block=['wall', 'gone']), 'runs', pool.map, retries=0) == [('block=wall', 'The file is in the way.'), ('block=gone', 'done')]
    assert noted('runs/block=gone', 'begin')[0].split()[0] == os.getcwd()


def test_dask_loses_a_worker(toy, tmp_path):
    "A local cluster of two processes, one of them killed in the middle of a run: everything is done, with the numbers of a serial sweep."
    import dask
    from dask.distributed import Client, LocalCluster
    settings, found = grid(k=[0, 1, 2]), []
    fresh = dask.config.set({'distributed.worker.multiprocessing-method': 'forkserver'})
    with fresh, LocalCluster(2, threads_per_worker=1, dashboard_address=None, local_directory=str(tmp_path)) as cluster, Client(cluster) as client:
        at_work = threading.Thread(target=lambda: found.extend(sweep(toy, settings, 'dask', client.get_executor().map)))
        with held(0):
            at_work.start()
            until(lambda: noted('dask/k=0', 'waits'))
            worker = int(Path('dask/k=0/log.txt').read_text().split()[1])
            assert worker in client.run(os.getpid).values()
            os.kill(worker, signal.SIGKILL)
        at_work.join(60)
    assert found == [('k=0', 'done'), ('k=1', 'done'), ('k=2', 'done')]
    assert len(pids('dask/k=0')) == 2
    assert sweep(toy, settings, 'serial') == found and plain(runs('dask')) == plain(runs('serial'))


# --- what is told -----------------------------------------------------------------------------------------------------------------

@pytest.fixture
def four(tmp_path):
    "Folders of four runs: done, at work, failed, not begun."
    for name, files in {'k=0': {'metrics.json': '{"seconds": 100}'}, 'k=1': {'.began': '', '.sweep.lock': ''}, 'k=2': {'failed.txt': 'Why?\n[/red] because\n'}, 'k=3': {}}.items():
        (tmp_path/name).mkdir()
        for file, text in files.items():
            (tmp_path/name/file).write_text(text)
    os.utime(tmp_path/'k=1'/'.began', (time.time() - 30,)*2)
    with FileLock(tmp_path/'k=1'/'.sweep.lock'):
        yield tmp_path


def test_state_comes_from_the_folders(four):
    table = sweep_state(four, grid(k=[0, 1, 2, 3, 4]))
    assert [*table.state] == ['done', 'running', 'failed', 'waiting', 'waiting'] and table.message[2] == '[/red] because'
    assert table.seconds[0] == 100 and 30 <= table.seconds[1] < 60
    assert 240 < time_left(table) <= 270 and re.match('1 done, 1 running, 1 failed, 2 waiting, 0:04:[0-9]+ left', summary_line(table))
    assert time_left(table[1:]) is None and summary_line(table[2:4]) == '1 failed, 1 waiting'
    assert run_one(('none.ipynb', str(four/'k=1'), {})) == ('k=1', 'elsewhere')


@pytest.mark.parametrize('lines', [40, 3])
def test_a_terminal_shows_a_table(four, monkeypatch, lines):
    shown = io.StringIO()
    monkeypatch.delenv('TQDM_DISABLE', raising=False)
    monkeypatch.setattr(sweeps, 'LINES', lines)
    monkeypatch.setattr(sweeps, 'Console', lambda stderr: rich.console.Console(file=shown, force_terminal=True, width=100))
    with sweeps.show_progress(four, grid(k=[0, 1, 2, 3]), .1):
        time.sleep(.3)
    for words in ('k=1', 'running', '[/red] because', '1 done, 1 running, 1 failed, 1 waiting, 0:02:'):
        assert words in shown.getvalue()
    assert ('k=3' in shown.getvalue()) == (lines == 40)


def test_elsewhere_a_line_tells_each_change(four, monkeypatch, capfd):
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


# --- real runs --------------------------------------------------------------------------------------------------------------------

def test_real_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('TQDM_DISABLE', '1')
    common = dict(methods=['cam'], scenes=12, closeups=32, batch_size=4, crop=64, target=32, resize=[64, 96], crf=False, refine='none', segmenter='none')
    settings = grid(seed=[0, 1])
    assert sweep(BOOK/'50_run.ipynb', settings, tmp_path, **common) == [('seed=0', 'done'), ('seed=1', 'done')]
    found = runs(tmp_path)
    assert all(r['metrics']['seed_miou']['cam'] > 0 and r['metrics']['parameters']['seed'] == r['settings']['seed'] for r in found)
    assert (tmp_path/'seed=0'/'result.png').exists() and sweep_state(tmp_path, settings).seconds.min() > 0
    for other in (dict(common, batch_size=8), {k: v for k, v in common.items() if k != 'batch_size'}):
        with pytest.raises(ValueError, match='batch_size = 4, now batch_size = 8'):
            sweep(BOOK/'50_run.ipynb', settings, tmp_path, **other)
    assert sweep(BOOK/'50_run.ipynb', settings, tmp_path, **common, workers=1, device='cpu') == [('seed=0', 'done'), ('seed=1', 'done')]
    assert plain(runs(tmp_path)) == plain(found)
