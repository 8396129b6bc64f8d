"""Tables from runs: against Python's statistics and scipy, on grids with holes.

And what the paper's tables must add up to.
"""
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
from ppc.methods import check_methods, contrast_reading
from ppc.parameters import Config
from ppc.tables import (
    collect_numbers,
    common_settings,
    compare_columns,
    compare_rows,
    conclusion,
    difference_plot,
    markdown,
    over_seeds,
    paired_differences,
    per_class,
    table_from_settings,
    variance_shares,
)

LITTLE = AblationTable(
    {'a': {'methods': ['seam']},
     'b': {'methods': ['seam+ppc'], 'k': 8},
     'c': {'methods': ['seam+ppc'], 'options': {'grid': 8}}},
    {'x': ({}, 'seed_miou'), 'y': ({'refine': 'psa'}, 'mask_miou')},
    'a',
    {'a': (50., None), 'b': (52.5, 60.)})


def run(settings, name='', **metrics):
    "A record as `ppc.sweeps.runs` reads it."
    text = json.dumps(settings)
    return {'name': name or text, 'settings': json.loads(text), 'metrics': metrics}


def seed_run(row, seed, value):
    settings = {**LITTLE.rows[row], 'seed': seed}
    return run(settings, seed_miou={settings['methods'][0]: value})


def mask_run(row, seed, **metrics):
    return run({**LITTLE.rows[row], 'refine': 'psa', 'seed': seed}, **metrics)


def runs_of(values):
    return [seed_run(row, seed, v) for (row, seed), v in values.items()]


def numbers_of(values):
    return collect_numbers(runs_of(values), LITTLE)


def column_x(table):
    return table.xs('x', level='column')


# holes everywhere: any of the rows, any of the seeds
PERCENT = st.floats(0, 100)
CELLS = st.tuples(st.sampled_from('abc'), st.integers(0, 6))
GRIDS = st.dictionaries(CELLS, PERCENT.map(lambda x: round(x, 3)), max_size=21)
SAMPLES = st.lists(PERCENT.map(lambda x: round(x, 2)), min_size=2, max_size=8)


@given(GRIDS)
@hypothesis(deadline=None)
def test_over_seeds_is_what_statistics_says(values):
    found = column_x(over_seeds(numbers_of(values)))
    assert list(found.index) == ['a', 'b', 'c']
    for row in 'abc':
        mine, f = {s: v for (r, s), v in values.items() if r == row}, found.loc[row]
        missing = sorted({s for _, s in values} - {*mine})
        assert f.n == len(mine) and f.missing == ', '.join(map(str, missing))
        want = [statistics.mean(mine.values()) if mine else math.nan,
                statistics.median(mine.values()) if mine else math.nan,
                statistics.stdev(mine.values()) if len(mine) > 1 else math.nan]
        np.testing.assert_allclose([f['mean'], f['median'], f['std']], want, atol=1e-9)


@given(GRIDS)
@hypothesis(deadline=None)
def test_paired_is_what_scipy_says(values):
    found = column_x(paired_differences(numbers_of(values), 'a'))
    for row in 'abc':
        seeds = [s for s in range(7) if ('a', s) in values and (row, s) in values]
        x, y = [values[row, s] for s in seeds], [values['a', s] for s in seeds]
        f = found.loc[row]
        assert f.n == len(seeds)
        if not seeds:
            assert math.isnan(f.difference)
        if len(seeds) < 2:
            assert math.isnan(f.low) and math.isnan(f.high)
        elif row != 'a' and len({round(a - b, 9) for a, b in zip(x, y)}) > 1:
            ends = stats.ttest_rel(x, y).confidence_interval(.95)
            want = [np.mean(x) - np.mean(y), ends.low, ends.high]
            np.testing.assert_allclose([f.difference, f.low, f.high], want, atol=1e-6)
        else:
            np.testing.assert_allclose([f.low, f.high], [f.difference]*2, atol=1e-6)


@given(GRIDS, st.floats(-20, 20), st.randoms(use_true_random=False))
@hypothesis(deadline=None)
def test_what_does_not_matter(values, shift, random):
    "The order of runs, runs of other tables, and for differences what all rows of a seed share."
    found = numbers_of(values)
    mixed = [*runs_of(values),
             run({'methods': ['seam'], 'seed': 0, 'epochs': 3}, seed_miou={'seam': 1.}),
             run({'methods': ['seam'], 'seed': 0, 'k': 8}, seed_miou={'seam': 2.})]
    random.shuffle(mixed)
    same = collect_numbers(mixed, LITTLE)
    pd.testing.assert_frame_equal(over_seeds(same), over_seeds(found))
    shifted = numbers_of({(r, s): v + shift*s for (r, s), v in values.items()})
    pd.testing.assert_frame_equal(paired_differences(shifted, 'a'), paired_differences(found, 'a'),
                                  atol=1e-6)


def test_intervals_hold_what_they_promise():
    """Of 95 % intervals from three paired seeds some 95 % hold the true difference, here 1.

    Seeds vary by much more.
    """
    rng, held = np.random.default_rng(0), []
    for _ in range(120):
        hard = rng.normal(0, 10, 3)
        a = {('a', s): 50 + hard[s] + rng.normal() for s in range(3)}
        b = {('b', s): 51 + hard[s] + rng.normal() for s in range(3)}
        f = paired_differences(numbers_of(a | b), 'a').loc['b', 'x']
        held.append(f.low < 1 < f.high)
    assert .9 <= np.mean(held) <= .99


@given(SAMPLES, SAMPLES)
@hypothesis(deadline=None)
def test_spread_is_the_textbooks(part, whole):
    if statistics.stdev(whole) < .1:
        return
    values = {(row, s): v for row, sample in (('a', whole), ('b', part))
              for s, v in enumerate(sample)}
    found = variance_shares(numbers_of(values), 'a').loc['b', 'x']
    s, n, m = statistics.stdev(part), len(part), len(whole)
    ratio = statistics.variance(part)/statistics.variance(whole)
    want = [s,
            math.sqrt((n - 1)*s*s/stats.chi2.ppf(.975, n - 1)),
            math.sqrt((n - 1)*s*s/stats.chi2.ppf(.025, n - 1)),
            ratio,
            ratio/stats.f.ppf(.975, n - 1, m - 1),
            ratio/stats.f.ppf(.025, n - 1, m - 1)]
    found = found[['std', 'low', 'high', 'share', 'share low', 'share high']].astype(float)
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-6)


def test_one_number_has_no_spread():
    values = {('a', 0): 5., ('a', 1): 7., ('b', 0): 5.}
    f = variance_shares(numbers_of(values), 'a').loc['b', 'x']
    assert f.n == 1 and f.drop('n').isna().all()


# --- which run belongs where ------------------------------------------------------------------

def test_a_run_belongs_to_its_row_only():
    assert len(collect_numbers([seed_run('b', 3, 1.)], LITTLE)) == 1
    for other in (dict(k=9), dict(epochs=1), dict(chance={'init': 0})):
        found = run({**LITTLE.rows['b'], 'seed': 3, **other}, seed_miou={'seam+ppc': 1.})
        assert len(collect_numbers([found], LITTLE)) == 0
    both = mask_run('a', 1, seed_miou={'seam': 50.}, mask_miou=60.)
    assert collect_numbers([both], LITTLE).values.tolist() == [['a', 'y', 1, 60.]]


def test_a_run_without_a_seed_of_its_own_has_that_of_its_parameters():
    found = run(LITTLE.rows['a'], seed_miou={'seam': 5.}, parameters={'seed': 3})
    assert collect_numbers([found], LITTLE).values.tolist() == [['a', 'x', 3, 5.]]


def test_the_same_number_twice_is_refused():
    with pytest.raises(ValueError, match='a, x, seed 0 is there twice'):
        collect_numbers([seed_run('a', 0, 1.), seed_run('a', 0, 1.)], LITTLE)


def test_a_number_that_a_run_lacks_is_missing():
    "Without masks there is no mIoU; a run that stopped before pseudo masks has none of those."
    stopped = mask_run('b', 0, seed_miou={'seam+ppc': 1.})
    found = collect_numbers([seed_run('a', 0, None), seed_run('b', 0, 1.), stopped], LITTLE)
    assert found.values.tolist() == [['b', 'x', 0, 1.]]
    assert over_seeds(found).missing['a', 'x'] == '0'


def test_nothing_at_all():
    found = collect_numbers([], LITTLE)
    assert over_seeds(found).n.sum() == 0 and paired_differences(found, 'a').n.sum() == 0
    assert per_class([], LITTLE, 'x').empty and common_settings([], LITTLE) == {}
    shown = compare_rows(found, LITTLE, 'x')
    assert shown.loc['b', 'paper'] == '52.50' and shown.loc['b', 'mean ± std'] == ''
    assert shown.loc['c', 'seeds'] == '0'
    assert 'none' in conclusion(found, LITTLE, 'x')
    with pytest.raises(ValueError, match='no finished runs'):
        table_from_settings([])


def test_of_several_methods_one_has_to_be_named():
    two = run({'methods': ['seam'], 'seed': 0}, seed_miou={'seam': 50., 'cam': 40.})
    with pytest.raises(ValueError, match='seed_miou of seam, cam: say which'):
        collect_numbers([two], LITTLE)
    named = LITTLE._replace(columns={'x': ({}, 'seed_miou/cam')})
    assert collect_numbers([two], named).value.tolist() == [40.]


def test_numbers_of_a_source_of_chance():
    runs = [run(s, seed_miou={s['methods'][0]: 50. + s['chance'].get('init', 9)})
            for s in grid_of(VARIANCE_TABLE, [0, 1, 2])]
    found = collect_numbers(runs, VARIANCE_TABLE)
    init = found[(found.row == 'init') & (found.column == 'train')]
    assert init.value.tolist() == [50., 51., 52.]
    assert set(found.groupby(['row', 'column'], observed=True).size()) == {3}
    assert set(found.row) == {*VARIANCE_TABLE.rows}
    chance = {'init': 0, 'order': 1, 'views': 0, 'noise': 0}
    uneven = run({**VARIANCE_TABLE.rows['all'], 'chance': chance}, seed_miou={'seam+ppc': 50.})
    assert len(collect_numbers([uneven], VARIANCE_TABLE)) == 0


# --- what is read -----------------------------------------------------------------------------

def test_compare_rows_shows_all():
    values = {('a', 0): 50., ('a', 1): 52., ('a', 2): 51.,
              ('b', 0): 53., ('b', 1): 54., ('c', 0): 49.}
    found = numbers_of(values)
    shown = compare_rows(found, LITTLE, 'x')
    assert shown.loc['a'].tolist() == ['50.00', '51.0 ± 1.0', '51.0', '3', '', '', '']
    low, high = stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95)
    assert shown.loc['b'].tolist() == [
        '52.50', '53.5 ± 0.7', '53.5', '2, lacks 2', '+2.5', '+2.5', f'{low:+.1f} to {high:+.1f}']
    assert shown.loc['c'].tolist() == ['', '49.0', '49.0', '1, lacks 1, 2', '', '-1.0', '']
    assert 'paper' not in compare_rows(found, LITTLE._replace(paper={}), 'x')


def test_compare_columns_shows_what_both_rows_have():
    "Seeds that one of them lacks count for neither, and a column that one lacks is left out."
    values = {('a', 0): 50., ('a', 1): 52., ('a', 2): 99., ('b', 0): 53., ('b', 1): 54.}
    masks = [mask_run('a', 0, mask_miou=60.)]
    shown = compare_columns(collect_numbers(runs_of(values) + masks, LITTLE), LITTLE, 'b')
    low, high = stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95)
    assert list(shown.index) == ['x']
    assert shown.loc['x'].tolist() == [
        '51.0 ± 1.4', '53.5 ± 0.7', '2', '+2.5', '+2.5', f'{low:+.1f} to {high:+.1f}']
    masks += [mask_run('b', 0, mask_miou=64.)]
    shown = compare_columns(collect_numbers(masks, LITTLE), LITTLE, 'b')
    assert shown.loc['y'].tolist() == ['60.0', '64.0', '1', '+4.0', '']   # no gain in the paper
    assert compare_columns(collect_numbers(runs_of(values)[:3], LITTLE), LITTLE, 'b').empty


def test_the_conclusion_is_that_of_the_numbers():
    values = {(r, s): v + .1*s*(r == 'b') for s in range(3)
              for r, v in (('a', 50), ('b', 55), ('c', 45))}
    table = LITTLE._replace(paper={'a': (1.,), 'b': (2.,), 'c': (3.,)})
    text = conclusion(collect_numbers(runs_of(values), table), table, 'x')
    assert 'above a: b; below: c; at most 3 seeds' in text
    assert f'{stats.kendalltau([1, 2, 3], [50, 55, 45]).statistic:.2f}' in text


def test_markdown_is_a_table():
    rows = pd.Index(['a', 'b'], name='row')
    text = markdown(pd.DataFrame({'x|y': ['1', ''], 'z': ['ä', '±']}, index=rows))
    assert text.splitlines() == [
        '| row | x\\|y | z |', '| --- | --- | --- |', '| a | 1 | ä |', '| b |  | ± |']


def test_classes_are_means_over_seeds():
    runs = [run({**LITTLE.rows['a'], 'seed': s},
                seed_iou={'seam': {'background': 90., 'cat': cat, 'dog': dog}})
            for s, cat, dog in ((0, 40., None), (1, 50., 30.))]
    runs.append(mask_run('b', 0, mask_iou={'background': 80., 'cat': 1.}))
    assert per_class(runs, LITTLE, 'x').loc['a'].tolist() == [90., 45., 30.]
    masks = per_class(runs, LITTLE, 'y').to_dict()
    assert masks == {'background': {'b': 80.}, 'cat': {'b': 1.}}


def test_one_table_one_way_of_making():
    def made(row, seed, **parameters):
        k = LITTLE.rows[row].get('k', 32)
        return run({**LITTLE.rows[row], 'seed': seed},
                   parameters={'seed': seed, 'k': k, **parameters})

    same = [made('a', 0, epochs=8), made('b', 1, epochs=8)]
    assert common_settings(same, LITTLE) == {'epochs': 8}
    # the parameter is missing in the record of an older edition, and has its default in the other
    default = made('b', 1, epochs=Config().cam.epochs)
    assert common_settings([made('a', 0), default], LITTLE) == {}
    with pytest.raises(ValueError, match='epochs = 3, .* with 8'):
        common_settings([made('a', 0, epochs=8), made('b', 0, epochs=3)], LITTLE)


def test_the_plot_shows_the_numbers():
    matplotlib.use('agg')
    values = {('a', 0): 50., ('a', 1): 52., ('b', 0): 53., ('b', 1): 54.}
    ax = difference_plot(numbers_of(values), LITTLE, 'x')
    assert [t.get_text() for t in ax.get_yticklabels()] == ['b']
    interval, dots, mean, paper, _ = ax.lines
    assert dots.get_xdata().tolist() == [3., 2.]
    assert mean.get_xdata()[0] == 2.5 and paper.get_xdata()[0] == 2.5
    want = stats.ttest_rel([53, 54], [50, 52]).confidence_interval(.95)
    np.testing.assert_allclose(interval.get_xdata(), want)
    plt.close('all')


def test_a_sweep_that_is_none_of_the_papers():
    runs = [run({'k': k, 'seed': s}, seed_miou={'cam': 40. + s, 'seam+ppc': 50. + k + s})
            for k in (8, 16) for s in (0, 1)]
    table = table_from_settings(runs)
    shown = compare_rows(collect_numbers(runs, table), table, 'seam+ppc')
    assert list(shown.index) == ['k = 8', 'k = 16']
    assert shown.loc['k = 16', 'minus k = 8'] == '+8.0'


# --- the paper's tables -----------------------------------------------------------------------

@pytest.mark.parametrize('table, row, gains', [
    (COMPONENTS_TABLE, '+ Pixel Sampling', (6.13, 7.22, 5.87, 7.11)),
    (REFINEMENT_TABLE, 'Ours w/ SEAM', (6.1, 7.2, 5.6, None)),
    (SEGMENTATION_TABLE, 'Ours w/ SEAM', (3.2, None))])
def test_gains_add_up(table, row, gains):
    "The paper prints its gains; numbers that were typed wrongly would not add up to them."
    for ours, base, gain in zip(table.paper[row], table.paper[table.against], gains):
        if gain is not None:
            assert round(ours - base, 2) == gain


@pytest.mark.parametrize('table, gains', [
    (REFINEMENT_TABLE, [1.0, 1.9, 1.7]),
    (SEGMENTATION_TABLE, [1.3, 1.7])])
def test_gains_over_eps_add_up(table, gains):
    pairs = zip(table.paper['Ours w/ EPS'], table.paper['EPS'])
    assert [round(a - b, 1) for a, b in pairs if a and b] == gains


def test_tables_share_their_numbers():
    components, k, transforms = ({row: numbers[0] for row, numbers in table.paper.items()}
                                 for table in (COMPONENTS_TABLE, K_TABLE, TRANSFORMS_TABLE))
    assert k['K = 0'] == components['SEAM'] and transforms['none'] == components['CAM']
    assert k['K = 32'] == transforms['rescale'] == components['+ Pixel Sampling']


@pytest.mark.parametrize('name', TABLES)
def test_tables_can_be_run(name):
    "Rows are made of parameters that exist; cells differ in settings or are one run."
    table = TABLES[name]
    for s in grid_of(table, [0, 1]):
        config = Config.from_flat(**{k: v for k, v in s.items() if k != 'methods'})
        check_methods(s['methods'], config)
    assert table.against in table.rows and {*table.paper} <= {*table.rows}
    assert all(len(v) == len(table.columns) for v in table.paper.values())
    rows = [json.dumps(r, sort_keys=True) for r in table.rows.values()]
    assert len({*rows}) == len(rows)
    seeds = grid_of(table, [0, 1])
    assert len(seeds) == 2*len(grid_of(table, [0])) and grid_of(table, []) == []


@pytest.mark.parametrize('start, reading, end', [
    ('paper', PAPER_READING, OFFICIAL_READING),
    ('official', OFFICIAL_READING, PAPER_READING)])
def test_presets_lead_from_one_to_the_other(start, reading, end):
    changed = {k for k in vars(reading) if vars(reading)[k] != vars(end)[k]}
    rows = {r: p for r, p in PRESETS_TABLE.rows.items() if p.get('reading') == start}
    assert len(rows) == 1 + len(changed) + len(BEYOND)
    steps = [contrast_reading(Config.from_flat(
        reading=p['reading'], options=p.get('options', {}))) for p in rows.values()]
    assert steps[0] == reading
    for step in steps[1:1 + len(changed)]:
        k, = (k for k in changed if vars(step)[k] != vars(reading)[k])
        assert vars(step)[k] == vars(end)[k]


def test_part_of_a_table():
    found = grid_of(COMPONENTS_TABLE, [4], ['SEAM'], ['train', 'train +CRF'])
    assert found == [{'methods': ['seam'], 'seed': 4}]
    with pytest.raises(ValueError, match="no 'SAEM', but CAM, SEAM"):
        grid_of(COMPONENTS_TABLE, [0], ['SAEM'])
    assert all(SEED in json.dumps(p) for t in TABLES.values() for p in cells(t).values())
