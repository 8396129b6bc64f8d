"The notebooks of the paper's tables: grids with holes, from one run to a table, misspelt rows."
import json
import warnings
from pathlib import Path
import matplotlib
import nbformat
import numpy as np
import papermill
import pytest
from ppc.ablations import (
    COMPONENTS_TABLE,
    K_TABLE,
    LONGER_TABLE,
    PRESETS_TABLE,
    REFINEMENT_TABLE,
    SEGMENTATION_TABLE,
    TRANSFORMS_TABLE,
    TUNING_TABLE,
    VARIANCE_TABLE,
    grid_of,
)
from ppc.sweeps import run_name, runs
from ppc.tables import over_seeds, paired_differences

pytestmark = pytest.mark.slow

NBS = Path(__file__).parent.parent/'nbs'
BOOKS = {
    '51_components': COMPONENTS_TABLE,
    '52_k': K_TABLE,
    '53_transforms': TRANSFORMS_TABLE,
    '54_refinement': REFINEMENT_TABLE,
    '55_segmentation': SEGMENTATION_TABLE,
    '56_presets': PRESETS_TABLE,
    '58_variance': VARIANCE_TABLE}


def made_up_metrics(method, value):
    "The record of a run whose seeds have an mIoU of `value`."
    iou = {'background': value + 30, 'cat': value - 10}
    return {
        'seed_miou': {method: value},
        'seed_crf_miou': {method: value + 2},
        'mask_miou': value + 3,
        'segmentation_miou': value + 1,
        'parameters': {},
        'seed_iou': {method: iou},
        'seed_crf_iou': {method: iou},
        'mask_iou': iou,
        'segmentation_iou': iou}


def make_up(root, settings):
    "Write records as runs leave them, with random numbers."
    rng = np.random.default_rng(0)
    for s in settings:
        folder = root/run_name(s)
        folder.mkdir(parents=True)
        metrics = made_up_metrics(s['methods'][0], float(rng.normal(50, 3)))
        for name, content in (('settings', s), ('metrics', metrics)):
            (folder/f'{name}.json').write_text(json.dumps(content))


def execute(name, monkeypatch, **parameters):
    "Run the code cells of a notebook in this process, with parameters; return its names."
    matplotlib.use('agg')
    monkeypatch.chdir(NBS)
    names = {'display': lambda *a: None}
    for cell in nbformat.read(NBS/f'{name}.ipynb', 4).cells:
        if cell.cell_type != 'code':
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Tight layout|.*identical low and high')
            exec(cell.source, names)
        if 'parameters' in cell.metadata.get('tags', []):
            names.update(parameters)
    matplotlib.pyplot.close('all')
    return names


@pytest.mark.parametrize('name', BOOKS)
def test_a_grid_with_holes_becomes_a_table(name, tmp_path, monkeypatch):
    """Three rows of the table, the last of them without seed 1.

    What is there is counted, what is not is named, and nothing is run.
    """
    table = BOOKS[name]
    rows = [table.against, *[r for r in table.rows if r != table.against][-2:]]
    without = grid_of(table, [1], rows[-1:])
    make_up(tmp_path, [s for s in grid_of(table, [0, 1, 2], rows) if s not in without])
    monkeypatch.setattr(papermill, 'execute_notebook', None)
    parameters = dict(root=str(tmp_path), rows=rows[:-1], columns=[], seeds=[0, 1, 2])
    names = execute(name, monkeypatch, **parameters)
    assert {*dict(names['outcomes']).values()} == {'done'}
    found, column = over_seeds(names['ours']), next(iter(table.columns))
    assert found.loc[(rows[1], column), 'n'] == 3
    assert found.loc[(rows[-1], column), ['n', 'missing']].tolist() == [2, '1']
    paired = paired_differences(names['ours'], table.against)
    assert paired.loc[(rows[-1], column), 'n'] == 2


OTHER_TABLES = [('tuning', TUNING_TABLE, 'tuned'), ('longer', LONGER_TABLE, 'longer')]


@pytest.mark.parametrize('name, table, shown', OTHER_TABLES)
def test_the_other_tables_of_presets(name, table, shown, tmp_path, monkeypatch):
    "`table: tuning` runs that table and shows its runs; the rest comes from the repository's."
    make_up(tmp_path, grid_of(table, [0, 1]))
    monkeypatch.setattr(papermill, 'execute_notebook', None)
    parameters = dict(root=str(tmp_path), table=name, rows=[], columns=[], seeds=[0, 1])
    names = execute('56_presets', monkeypatch, **parameters)
    assert {*dict(names['outcomes']).values()} == {'done'}
    assert over_seeds(names[shown]).n.tolist() == [2]*len(table.columns)*len(table.rows)
    assert {*names['ours'].row} == {*PRESETS_TABLE.rows}


def test_from_one_run_to_a_table(tmp_path):
    """As a reader would, by papermill: one row, one seed.

    A second time with another row, the first is not run again.
    """
    root, out = tmp_path/'components', tmp_path/'out.ipynb'

    def table(*rows):  # -> the texts that the notebook shows, cell by cell
        parameters = dict(root=str(root), shared=str(tmp_path/'shared'), rows=[*rows],
                          columns=['train'], seeds=[7])
        papermill.execute_notebook(str(NBS/'51_components.ipynb'), str(out), parameters,
                                   cwd=str(NBS), progress_bar=False, kernel_name='python3')
        outputs = [cell.get('outputs', []) for cell in nbformat.read(out, 4).cells]
        return [''.join(o.get('data', {}).get('text/plain', '') for o in of_cell)
                for of_cell in outputs]

    first = table('SEAM')
    made, = runs(root)
    value = made['metrics']['seed_miou']['seam']
    assert any(f'{value:.1f}' in text and '61.54' in text for text in first)
    record = root/made['name']/'metrics.json'
    stamp = record.stat().st_mtime_ns
    table('SEAM', 'CAM')
    assert len(runs(root)) == 2 and record.stat().st_mtime_ns == stamp


def test_a_misspelt_row_ends_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no 'SAEM'"):
        execute('51_components', monkeypatch, root=str(tmp_path), rows=['SAEM'])
    assert not [*tmp_path.iterdir()]
