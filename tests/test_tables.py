"Tables from runs: against Python's statistics and scipy by hand, on grids with holes, and what the paper's tables must add up to."
import json
import math
import statistics
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from scipy import stats
from ppc import parameters
from ppc.ablations import (
    BEYOND,
    COMPONENTS_TABLE,
    K_TABLE,
    PRESETS_TABLE,
    REFINEMENT_TABLE,
    SEED,
    SEGMENTATION_TABLE,
    TABLES,
    TRANSFORMS_TABLE,
    VARIANCE_TABLE,
    AblationTable,
    cells,
    grid_of,
)
from ppc.contrast import OFFICIAL_READING, PAPER_READING
from ppc.stages import contrast_reading, method_losses
from ppc.tables import (
    collect_numbers,
    common_settings,
    compare_columns,
    compare_rows,
    conclusion,
    difference_plot,
    differences,
    markdown,
    over_seeds,
    paired_differences,
    per_class,
    table_from_settings,
    variance_shares,
)

LITTLE = AblationTable({'a': {'methods': ['seam']}, 'b': {'methods': ['seam+ppc'], 'k': 8}, 'c': {'methods': ['seam+ppc'], 'options': {'grid': 8}}},
               {'x': ({}, 'seed_miou'), 'y': ({'refine': 'psa'}, 'mask_miou')}, 'a', {'a': (50., None), 'b': (52.5, 60.)})


def run(settings, name='', **metrics): return {'name': name or json.dumps(settings), 'settings': json.loads(json.dumps(settings)), 'metrics': metrics}
def seed_run(row, seed, value): return run({**LITTLE.rows[row], 'seed': seed}, seed_miou={LITTLE.rows[row]['methods'][0]: value})


def runs_of(values): return [seed_run(row, seed, v) for (row, seed), v in values.items()]


# holes everywhere: any of the rows, any of the seeds
GRIDS = st.dictionaries(st.tuples(st.sampled_from('abc'), st.integers(0, 6)), st.floats(0, 100).map(lambda x: round(x, 3)), max_size=21)


@given(GRIDS)
@hypothesis(deadline=None)
def test_over_seeds_is_what_statistics_says(values):
    found = over_seeds(collect_numbers(runs_of(values), LITTLE)).xs('x', level='column')
    assert list(found.index) == ['a', 'b', 'c']
    for row in 'abc':
        mine, f = {s: v for (r, s), v in values.items() if r == row}, found.loc[row]
        assert f.n == len(mine) and f.missing == ', '.join(map(str, sorted({s for _, s in values} - {*mine})))
        want = [statistics.mean(mine.values()) if mine else math.nan, statistics.median(mine.values()) if mine else math.nan,
                statistics.stdev(mine.values()) if len(mine) > 1 else math.nan]
        np.testing.assert_allclose([f['mean'], f['median'], f['std']], want, atol=1e-9)


@given(GRIDS)
@hypothesis(deadline=None)
def test_paired_is_what_scipy_says(values):
    found = paired_differences(collect_numbers(runs_of(values), LITTLE), 'a').xs('x', level='column')
    for row in 'abc':
        seeds = [s for s in range(7) if ('a', s) in values and (row, s) in values]
        x, y, f = [values[row, s] for s in seeds], [values['a', s] for s in seeds], found.loc[row]
        assert f.n == len(seeds)
        if not seeds:
            assert math.isnan(f.difference)
        if len(seeds) < 2:
            assert math.isnan(f.low) and math.isnan(f.high)
        elif row != 'a' and len({round(a - b, 9) for a, b in zip(x, y)}) > 1:
            want = stats.ttest_rel(x, y).confidence_interval(.95)
            np.testing.assert_allclose([f.difference, f.low, f.high], [np.mean(x) - np.mean(y), want.low, want.high], atol=1e-6)
        else:
            np.testing.assert_allclose([f.low, f.high], [f.difference]*2, atol=1e-6)


@given(GRIDS, st.floats(-20, 20), st.randoms(use_true_random=False))
@hypothesis(deadline=None)
def test_what_does_not_matter(values, more, lot):
    "The order of runs, runs of other tables, and for differences whatever all rows of a seed have in common."
    runs = runs_of(values)
    other = [run({'methods': ['seam'], 'seed': 0, 'epochs': 3}, seed_miou={'seam': 1.}), run({'methods': ['seam'], 'seed': 0, 'k': 8}, seed_miou={'seam': 2.})]
    mixed = runs + other
    lot.shuffle(mixed)
    pd.testing.assert_frame_equal(over_seeds(collect_numbers(mixed, LITTLE)), over_seeds(collect_numbers(runs, LITTLE)))
    shifted = runs_of({(r, s): v + more*s for (r, s), v in values.items()})
    pd.testing.assert_frame_equal(paired_differences(collect_numbers(shifted, LITTLE), 'a'), paired_differences(collect_numbers(runs, LITTLE), 'a'), atol=1e-6)


def test_intervals_hold_what_they_promise():
    "Of 95 % intervals from three paired seeds, of rows whose true difference is 1, some 95 % hold 1; seeds vary by much more."
    rng, held = np.random.default_rng(0), []
    for _ in range(120):
        hard = rng.normal(0, 10, 3)
        values = {('a', s): 50 + hard[s] + rng.normal() for s in range(3)} | {('b', s): 51 + hard[s] + rng.normal() for s in range(3)}
        f = paired_differences(collect_numbers(runs_of(values), LITTLE), 'a').loc['b', 'x']
        held.append(f.low < 1 < f.high)
    assert .9 <= np.mean(held) <= .99


@given(st.lists(st.floats(0, 100).map(lambda x: round(x, 2)), min_size=2, max_size=8), st.lists(st.floats(0, 100).map(lambda x: round(x, 2)), min_size=2, max_size=8))
@hypothesis(deadline=None)
def test_spread_is_the_textbooks(part, whole):
    if statistics.stdev(whole) < .1:
        return
    found = variance_shares(collect_numbers(runs_of({('a', s): v for s, v in enumerate(whole)} | {('b', s): v for s, v in enumerate(part)}), LITTLE), 'a').loc['b', 'x']
    s, n, m = statistics.stdev(part), len(part), len(whole)
    ratio = statistics.variance(part)/statistics.variance(whole)
    want = [s, math.sqrt((n - 1)*s*s/stats.chi2.ppf(.975, n - 1)), math.sqrt((n - 1)*s*s/stats.chi2.ppf(.025, n - 1)),
            ratio, ratio/stats.f.ppf(.975, n - 1, m - 1), ratio/stats.f.ppf(.025, n - 1, m - 1)]
    np.testing.assert_allclose(found[['std', 'low', 'high', 'share', 'share low', 'share high']].astype(float), want, rtol=1e-6, atol=1e-6)


def test_one_number_has_no_spread():
    f = variance_shares(collect_numbers([seed_run('a', 0, 5.), seed_run('a', 1, 7.), seed_run('b', 0, 5.)], LITTLE), 'a').loc['b', 'x']
    assert f.n == 1 and f.drop('n').isna().all()


# --- which run belongs where --------------------------------------------------------------------------------------------------

def test_a_run_belongs_to_its_row_only():
    assert len(collect_numbers([seed_run('b', 3, 1.)], LITTLE)) == 1
    for other in (dict(k=9), dict(epochs=1), dict(chance={'init': 0})):
        assert len(collect_numbers([run({**LITTLE.rows['b'], 'seed': 3, **other}, seed_miou={'seam+ppc': 1.})], LITTLE)) == 0
    both = run({**LITTLE.rows['a'], 'refine': 'psa', 'seed': 1}, seed_miou={'seam': 50.}, mask_miou=60.)
    assert collect_numbers([both], LITTLE).values.tolist() == [['a', 'y', 1, 60.]]


def test_a_run_without_a_seed_of_its_own_has_that_of_its_parameters():
    found = collect_numbers([run(LITTLE.rows['a'], seed_miou={'seam': 5.}, parameters={'seed': 3})], LITTLE)
    assert found.values.tolist() == [['a', 'x', 3, 5.]]


def test_the_same_number_twice_is_refused():
    with pytest.raises(ValueError, match='a, x, seed 0 is there twice'):
        collect_numbers([seed_run('a', 0, 1.), seed_run('a', 0, 1.)], LITTLE)


def test_a_number_that_nobody_has_is_missing():
    "Without masks there is no mIoU; a run that stopped before pseudo masks has none of those."
    found = collect_numbers([seed_run('a', 0, None), seed_run('b', 0, 1.), run({**LITTLE.rows['b'], 'refine': 'psa', 'seed': 0}, seed_miou={'seam+ppc': 1.})], LITTLE)
    assert found.values.tolist() == [['b', 'x', 0, 1.]] and over_seeds(found).missing['a', 'x'] == '0'


def test_nothing_at_all():
    found = collect_numbers([], LITTLE)
    assert over_seeds(found).n.sum() == 0 and paired_differences(found, 'a').n.sum() == 0 and per_class([], LITTLE, 'x').empty and common_settings([], LITTLE) == {}
    shown = compare_rows(found, LITTLE, 'x')
    assert shown.loc['b', 'paper'] == '52.50' and shown.loc['b', 'mean ± std'] == '' and shown.loc['c', 'seeds'] == '0'
    assert 'none' in conclusion(found, LITTLE, 'x')
    with pytest.raises(ValueError, match='no finished runs'):
        table_from_settings([])


def test_several_methods_have_to_be_told_apart():
    two = run({'methods': ['seam'], 'seed': 0}, seed_miou={'seam': 50., 'cam': 40.})
    with pytest.raises(ValueError, match='seed_miou of seam, cam: say which'):
        collect_numbers([two], LITTLE)
    assert collect_numbers([two], LITTLE._replace(columns={'x': ({}, 'seed_miou/cam')})).value.tolist() == [40.]


def test_numbers_of_a_source_of_chance():
    runs = [run(s, seed_miou={s['methods'][0]: 50. + s['chance'].get('init', 9)}) for s in grid_of(VARIANCE_TABLE, [0, 1, 2])]
    found = collect_numbers(runs, VARIANCE_TABLE)
    assert found[(found.row == 'init') & (found.column == 'train')].value.tolist() == [50., 51., 52.]
    assert set(found.groupby(['row', 'column'], observed=True).size()) == {3} and set(found.row) == {*VARIANCE_TABLE.rows}
    uneven = run({**VARIANCE_TABLE.rows['all'], 'chance': {'init': 0, 'order': 1, 'views': 0, 'noise': 0}}, seed_miou={'seam+ppc': 50.})
    assert len(collect_numbers([uneven], VARIANCE_TABLE)) == 0


# --- what is read -------------------------------------------------------------------------------------------------------------

def test_beside_tells_all():
    values = {('a', 0): 50., ('a', 1): 52., ('a', 2): 51., ('b', 0): 53., ('b', 1): 54., ('c', 0): 49.}
    shown = compare_rows(collect_numbers(runs_of(values), LITTLE), LITTLE, 'x')
    assert shown.loc['a'].tolist() == ['50.00', '51.0 ± 1.0', '51.0', '3', '', '', '']
    low, high = stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95)
    assert shown.loc['b'].tolist() == ['52.50', '53.5 ± 0.7', '53.5', '2, lacks 2', '+2.5', '+2.5', f'{low:+.1f} to {high:+.1f}']
    assert shown.loc['c'].tolist() == ['', '49.0', '49.0', '1, lacks 1, 2', '', '-1.0', '']
    assert 'paper' not in compare_rows(collect_numbers(runs_of(values), LITTLE), LITTLE._replace(paper={}), 'x')


def test_along_tells_what_both_rows_have():
    "Seeds that one of them lacks count for neither, and a column that one of them lacks is not there."
    values = {('a', 0): 50., ('a', 1): 52., ('a', 2): 99., ('b', 0): 53., ('b', 1): 54.}
    masks = [run({**LITTLE.rows['a'], 'refine': 'psa', 'seed': 0}, mask_miou=60.)]
    shown = compare_columns(collect_numbers(runs_of(values) + masks, LITTLE), LITTLE, 'b')
    low, high = stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95)
    assert list(shown.index) == ['x'] and shown.loc['x'].tolist() == ['51.0 ± 1.4', '53.5 ± 0.7', '2', '+2.5', '+2.5', f'{low:+.1f} to {high:+.1f}']
    masks += [run({**LITTLE.rows['b'], 'refine': 'psa', 'seed': 0}, mask_miou=64.)]
    assert compare_columns(collect_numbers(masks, LITTLE), LITTLE, 'b').loc['y'].tolist() == ['60.0', '64.0', '1', '+4.0', '']   # of y the paper has one number alone
    assert compare_columns(collect_numbers(runs_of(values)[:3], LITTLE), LITTLE, 'b').empty


def test_words_are_those_of_the_numbers():
    values = {(r, s): v + .1*s*(r == 'b') for s in range(3) for r, v in (('a', 50), ('b', 55), ('c', 45))}
    text = conclusion(collect_numbers(runs_of(values), LITTLE._replace(paper={'a': (1.,), 'b': (2.,), 'c': (3.,)})), LITTLE._replace(paper={'a': (1.,), 'b': (2.,), 'c': (3.,)}), 'x')
    assert 'above a: b; below: c; at most 3 seeds' in text
    assert f'{stats.kendalltau([1, 2, 3], [50, 55, 45]).statistic:.2f}' in text


def test_markdown_is_a_table():
    text = markdown(pd.DataFrame({'x|y': ['1', ''], 'z': ['ä', '±']}, index=pd.Index(['a', 'b'], name='row')))
    assert text.splitlines() == ['| row | x\\|y | z |', '| --- | --- | --- |', '| a | 1 | ä |', '| b |  | ± |']


def test_classes_are_means_over_seeds():
    runs = [run({**LITTLE.rows['a'], 'seed': s}, seed_iou={'seam': {'background': 90., 'cat': c, 'dog': d}}) for s, c, d in ((0, 40., None), (1, 50., 30.))]
    runs.append(run({**LITTLE.rows['b'], 'refine': 'psa', 'seed': 0}, mask_iou={'background': 80., 'cat': 1.}))
    assert per_class(runs, LITTLE, 'x').loc['a'].tolist() == [90., 45., 30.]
    assert per_class(runs, LITTLE, 'y').to_dict() == {'background': {'b': 80.}, 'cat': {'b': 1.}}


def test_one_table_one_way_of_making():
    told = lambda row, seed, **p: run({**LITTLE.rows[row], 'seed': seed}, parameters={'seed': seed, 'k': LITTLE.rows[row].get('k', 32), **p})
    assert common_settings([told('a', 0, epochs=8), told('b', 1, epochs=8)], LITTLE) == {'epochs': 8}
    assert common_settings([told('a', 0), told('b', 1, epochs=parameters.CamTraining().epochs)], LITTLE) == {}   # an edition that did not have it, and its default
    with pytest.raises(ValueError, match='epochs = 3, .* with 8'):
        common_settings([told('a', 0, epochs=8), told('b', 0, epochs=3)], LITTLE)


def test_the_plot_shows_the_numbers():
    matplotlib.use('agg')
    values = {('a', 0): 50., ('a', 1): 52., ('b', 0): 53., ('b', 1): 54.}
    ax = difference_plot(collect_numbers(runs_of(values), LITTLE), LITTLE, 'x')
    assert [t.get_text() for t in ax.get_yticklabels()] == ['b']
    interval, dots, mean, paper, _ = ax.lines
    assert dots.get_xdata().tolist() == [3., 2.] and mean.get_xdata()[0] == 2.5 and paper.get_xdata()[0] == 2.5
    np.testing.assert_allclose(interval.get_xdata(), stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95))
    plt.close('all')


def test_a_sweep_of_ones_own():
    runs = [run({'k': k, 'seed': s}, seed_miou={'cam': 40. + s, 'seam+ppc': 50. + k + s}) for k in (8, 16) for s in (0, 1)]
    table = table_from_settings(runs)
    shown = compare_rows(collect_numbers(runs, table), table, 'seam+ppc')
    assert list(shown.index) == ['k = 8', 'k = 16'] and shown.loc['k = 16', 'minus k = 8'] == '+8.0'


# --- the paper's tables -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('table, row, gains', [(COMPONENTS_TABLE, '+ Pixel Sampling', (6.13, 7.22, 5.87, 7.11)), (REFINEMENT_TABLE, 'Ours w/ SEAM', (6.1, 7.2, 5.6, None)),
                                               (SEGMENTATION_TABLE, 'Ours w/ SEAM', (3.2, None))])
def test_gains_add_up(table, row, gains):
    "The paper prints its gains; numbers that were typed wrongly would not add up to them."
    for ours, base, gain in zip(table.paper[row], table.paper[table.against], gains):
        if gain is not None:
            assert round(ours - base, 2) == gain


def test_gains_over_eps_add_up():
    gain = lambda table: [round(a - b, 1) for a, b in zip(table.paper['Ours w/ EPS'], table.paper['EPS']) if a and b]
    assert gain(REFINEMENT_TABLE) == [1.0, 1.9, 1.7] and gain(SEGMENTATION_TABLE) == [1.3, 1.7]


def test_tables_share_their_numbers():
    assert K_TABLE.paper['K = 0'][0] == COMPONENTS_TABLE.paper['SEAM'][0] and TRANSFORMS_TABLE.paper['none'][0] == COMPONENTS_TABLE.paper['CAM'][0]
    assert K_TABLE.paper['K = 32'][0] == TRANSFORMS_TABLE.paper['rescale'][0] == COMPONENTS_TABLE.paper['+ Pixel Sampling'][0]


@pytest.mark.parametrize('name', TABLES)
def test_tables_can_be_run(name):
    "Each row is made of parameters that exist; settings of different cells differ, or are one run for two columns."
    table = TABLES[name]
    for s in grid_of(table, [0, 1]):
        parts = parameters.settings(**{k: v for k, v in s.items() if k != 'methods'})
        method_losses(s['methods'][0], parts[parameters.CamTraining])
    assert table.against in table.rows and {*table.paper} <= {*table.rows} and all(len(v) == len(table.columns) for v in table.paper.values())
    rows = [json.dumps(r, sort_keys=True) for r in table.rows.values()]
    assert len({*rows}) == len(rows)
    seeds = grid_of(table, [0, 1])
    assert len(seeds) == 2*len(grid_of(table, [0])) and grid_of(table, []) == []


def test_presets_lead_from_one_to_the_other():
    changed = {k for k in vars(PAPER_READING) if vars(PAPER_READING)[k] != vars(OFFICIAL_READING)[k]}
    for start, end, reading in (('paper', OFFICIAL_READING, PAPER_READING), ('official', PAPER_READING, OFFICIAL_READING)):
        rows = {r: p for r, p in PRESETS_TABLE.rows.items() if p.get('reading') == start}
        assert len(rows) == 1 + len(changed) + len(BEYOND)
        steps = [contrast_reading(parameters.CamTraining(reading=p['reading'], options=p.get('options', {}))) for p in rows.values()]
        assert steps[0] == reading
        for step in steps[1:1 + len(changed)]:
            k, = (k for k in changed if vars(step)[k] != vars(reading)[k])
            assert vars(step)[k] == vars(end)[k]


def test_part_of_a_table():
    assert grid_of(COMPONENTS_TABLE, [4], ['SEAM'], ['train', 'train +CRF']) == [{'methods': ['seam'], 'seed': 4}]
    with pytest.raises(ValueError, match="no 'SAEM', but CAM, SEAM"):
        grid_of(COMPONENTS_TABLE, [0], ['SAEM'])
    assert all(SEED in json.dumps(p) for t in TABLES.values() for p in cells(t).values())
