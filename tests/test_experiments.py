"The notebooks that make the paper's tables: on a grid with holes, from one run to a table, and misspelt rows."
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

NBS = Path(__file__).parent.parent/'nbs'
BOOKS = {'51_components': COMPONENTS_TABLE, '52_k': K_TABLE, '53_transforms': TRANSFORMS_TABLE, '54_refinement': REFINEMENT_TABLE, '55_segmentation': SEGMENTATION_TABLE, '56_presets': PRESETS_TABLE, '58_variance': VARIANCE_TABLE}


def make_up(root, settings):
    "Records as runs leave them: row 3 of 4 has a value of its own, and seeds differ."
    rng = np.random.default_rng(0)
    for s in settings:
        m, value = s['methods'][0], float(rng.normal(50, 3))
        iou = {'background': value + 30, 'cat': value - 10}
        metrics = {'seed_miou': {m: value}, 'seed_crf_miou': {m: value + 2}, 'mask_miou': value + 3, 'segmentation_miou': value + 1, 'parameters': {},
                   'seed_iou': {m: iou}, 'seed_crf_iou': {m: iou}, 'mask_iou': iou, 'segmentation_iou': iou}
        (root/run_name(s)).mkdir(parents=True)
        for name, x in (('settings', s), ('metrics', metrics)):
            (root/run_name(s)/f'{name}.json').write_text(json.dumps(x))


def execute(name, monkeypatch, **parameters):
    "The code cells of a notebook, in this process, told so; returns what its names stand for."
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
    "Three rows of the table, the last of them without seed 1: what is there is counted, what is not is named, nothing is run."
    table = BOOKS[name]
    rows = [table.against, *[r for r in table.rows if r != table.against][-2:]]
    settings = [s for i, s in enumerate(grid_of(table, [0, 1, 2], rows)) if s not in grid_of(table, [1], rows[-1:])]
    make_up(tmp_path, settings)
    monkeypatch.setattr(papermill, 'execute_notebook', None)
    names = execute(name, monkeypatch, root=str(tmp_path), rows=rows[:-1], columns=[], seeds=[0, 1, 2])
    assert {*dict(names['outcomes']).values()} == {'done'}
    found, column = over_seeds(names['ours']), next(iter(table.columns))
    assert found.loc[(rows[1], column), 'n'] == 3 and found.loc[(rows[-1], column), ['n', 'missing']].tolist() == [2, '1']
    assert paired_differences(names['ours'], table.against).loc[(rows[-1], column), 'n'] == 2


@pytest.mark.parametrize('name, table, shown', [('tuning', TUNING_TABLE, 'tuned'), ('longer', LONGER_TABLE, 'longer')])
def test_the_other_tables_of_presets(name, table, shown, tmp_path, monkeypatch):
    "`table: tuning` runs that table and shows its runs, the rest is of the runs that came along."
    make_up(tmp_path, grid_of(table, [0, 1]))
    monkeypatch.setattr(papermill, 'execute_notebook', None)
    names = execute('56_presets', monkeypatch, root=str(tmp_path), table=name, rows=[], columns=[], seeds=[0, 1])
    assert {*dict(names['outcomes']).values()} == {'done'}
    assert over_seeds(names[shown]).n.tolist() == [2]*len(table.columns)*len(table.rows) and {*names['ours'].row} == {*PRESETS_TABLE.rows}


def test_from_one_run_to_a_table(tmp_path):
    "As a reader would, by papermill: one row, one seed; a second time with another row, the first is not run again."
    def table(*rows):
        parameters = dict(root=str(tmp_path/'components'), shared=str(tmp_path/'shared'), rows=[*rows], columns=['train'], seeds=[7])
        papermill.execute_notebook(str(NBS/'51_components.ipynb'), str(tmp_path/'out.ipynb'), parameters, cwd=str(NBS), progress_bar=False, kernel_name='python3')
        return [''.join(o.get('data', {}).get('text/plain', '') for o in c.get('outputs', [])) for c in nbformat.read(tmp_path/'out.ipynb', 4).cells]
    first = table('SEAM')
    made, = runs(tmp_path/'components')
    value = made['metrics']['seed_miou']['seam']
    assert any(f'{value:.1f}' in text and '61.54' in text for text in first)
    stamp = (tmp_path/'components'/made['name']/'metrics.json').stat().st_mtime_ns
    table('SEAM', 'CAM')
    assert len(runs(tmp_path/'components')) == 2 and (tmp_path/'components'/made['name']/'metrics.json').stat().st_mtime_ns == stamp


def test_a_misspelt_row_ends_before_anything_runs(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no 'SAEM'"):
        execute('51_components', monkeypatch, root=str(tmp_path), rows=['SAEM'])
    assert not [*tmp_path.iterdir()]
