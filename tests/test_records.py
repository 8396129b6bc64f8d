"The committed records of runs are bit for bit what the runs left."
import hashlib
import json
import re
from pathlib import Path
import pytest
from ppc import sweeps
from ppc.ablations import BUDGETS, TABLES, grid_of
from ppc.sweeps import run_name, runs, sweep

ROOT = Path(__file__).parent.parent
RESULTS = ROOT/'runs'/'results'
# no sweep made these: their settings were taken from their parameters
BY_HAND = 'demo', 'hard-scenes', 'irn', 'baselines', 'options', 'voc-animals'
DIGESTS = {   # sweep -> number of runs, digest of their records
    'baselines': (3, '2ffbcdd919e1b70e96bd2b4391ae36c14641b340316d6b2dcac24c2ee60744d3'),
    'components': (63, 'e27b63a7acb645eca28f1a749f43941581c71a7ac6e03910e434f2b3cbb3ecb4'),
    'components-animals': (18, 'eed9abb3fabb33167496eea7f11e69bbe229ee4f57d0b8b8fc16aff9b5bcf683'),
    'components-calm': (18, '4b55b3e046543dc493ca22eba784b310512c82a38a928ba50d09200507b0b0bd'),
    'components-lite0': (6, '610c568e212fb658852cc60388a8e904b74674e0b460fe594aebb76cf23fae94'),
    'components-short-animals':
        (18, '8dce749f3484cbe41d47114dcfca8a00dd97f07123f0cc9ec36ec7f99474d3af'),
    'demo': (5, 'cdfb37d9260fd140eefc3c5aa66b7c146ffc182013c68cbf58d82ff9396fd12f'),
    'hard-scenes': (3, '4dd8ae97496e4310ea17ac949dccdf6c631a4c3b2aafea4189e2c8fec1d65a3e'),
    'irn': (3, 'be33d7554db3183dd81448ee944a584b030ae974100fb70d7c64debcbec443a7'),
    'k': (18, '5d48dec5fee01b390c794b6019812abd9efeb65839bc257177ba7c57a510a1db'),
    'k-animals': (4, '065553951f4a06f88fcd60aeda50e86eb6c7d789704afe5df7c073d6612c43f7'),
    'longer': (27, 'dac22dc02eecf4bc38d8f4f942c3c631ecd8b728cec354afd9e0807b4e1b72c6'),
    'longer-animals': (24, '205c4a96bc68633da362089f76aac39adf3c2011b040f0f9aabd46c436d7e5bd'),
    'options': (48, 'c6ce55d9c698b2225ad2802a0c109f838951077cf8737ff9a37ce498160e6d05'),
    'own-animals': (15, '9669e5f3fa9176988334adf182fdb4ededa59d447476bc43bb202505b1767ad6'),
    'presets': (93, 'def7920e1c1fc9be160b0dc0d38ec5bb73756e5acf19b8583d91da02670fc541'),
    'refinement': (33, 'c9e94c3c9740d3629cf40b76a6e98a218b06ae1c3136b37795e6b8c659c2cd4b'),
    'segmentation': (24, '77d0095100c71258efaa17dbdfd03598d37b2b0f7015f47db5fc8996fd785d3b'),
    'transforms': (15, '50d8edb8d4bd11387b4b1954321b152e89bd65fb5047d1845135e492f671c2c0'),
    'tuning-animals': (34, 'cb6879f8abdc8e8b694c8faa93e622702c9220f2f4a7842aef86252fd8be6d2e'),
    'variance': (114, '65ceadb918d7964d754a6d2d900711080c72889c169502dea9d7d9e524395f60'),
    'voc-animals': (7, '7449a1f0b3599e901609ff23f92e154844b246ab9a2702811556b4489822a78d'),
}


def read_lines(sweep):
    "The records of a sweep as they stand in its file: name -> settings and metrics."
    lines = [json.loads(line) for line in (RESULTS/f'{sweep}.jsonl').read_text().splitlines()]
    return {line.pop('name'): line for line in lines}


def digest(records):
    "SHA-256 over canonical JSON: equal exactly when every name and every number is."
    text = json.dumps(records, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize('sweep', DIGESTS)
def test_history_is_kept_bit_for_bit(sweep):
    "The digests were computed from the files that the runs left, before they became one file."
    records = read_lines(sweep)
    if sweep in BY_HAND:
        records = {name: {'metrics': r['metrics']} for name, r in records.items()}
    assert (len(records), digest(records)) == DIGESTS[sweep]


def test_every_sweep_has_its_digest():
    assert {f.stem for f in RESULTS.glob('*.jsonl')} == {*DIGESTS}


@pytest.mark.parametrize('sweep', DIGESTS)
def test_a_record_is_found_by_its_settings(sweep):
    "Settings are those of the run's parameters, no two runs have the same, and lines are sorted."
    records = read_lines(sweep)
    assert [*records] == sorted(records)
    assert len({run_name(r['settings']) for r in records.values()}) == len(records)
    for r in records.values():
        made = {**r['metrics']['parameters'], 'methods': [*r['metrics']['seed_miou']]}
        assert all(made[k] == v for k, v in r['settings'].items())


@pytest.mark.parametrize('sweep', DIGESTS)
def test_folder_and_file_are_one_name(sweep):
    found = runs(RESULTS/sweep)
    assert found == runs(RESULTS/f'{sweep}.jsonl')
    assert {r['name']: r['metrics']['seed_miou'] for r in found} == {
        name: r['metrics']['seed_miou'] for name, r in read_lines(sweep).items()}


def test_records_name_no_machine():
    "No path from the root of somebody's machine, but parameters that a run can be given again."
    for file in RESULTS.glob('*.jsonl'):
        assert not re.search(r'"(/|\.\./|~)', file.read_text()), file


SCENES = ('components', 'k', 'longer', 'presets', 'refinement', 'segmentation', 'transforms',
          'variance')


@pytest.mark.parametrize('name', SCENES)
def test_a_sweep_into_the_records_runs_nothing(name, monkeypatch):
    "Called with the settings of its records, a sweep finds all of them done and makes no folder."
    monkeypatch.setenv('TQDM_DISABLE', '1')
    monkeypatch.setattr(sweeps, 'run_one', None)
    recorded = {run_name(r['settings']) for r in runs(RESULTS/name)}
    settings = [s for s in grid_of(TABLES[name], range(20)) if run_name(s) in recorded]
    assert len(settings) == len(recorded)
    outcomes = sweep(ROOT/'nbs'/'50_run.ipynb', settings, RESULTS/name, **BUDGETS['scenes'])
    assert {outcome for _, outcome in outcomes} == {'done'} and not (RESULTS/name).exists()
