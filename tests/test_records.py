"The committed records of runs are bit for bit what the runs left."
import hashlib
import json
import re
from pathlib import Path
import pytest

RESULTS = Path(__file__).parent.parent/'runs'/'results'
SINGLE_RUNS = 'demo', 'irn'   # a folder a run, `demo-seed0`, and no settings.json
# no sweep made these: they have no settings.json
BY_HAND = *SINGLE_RUNS, 'baselines', 'options', 'voc-animals'
DIGESTS = {   # sweep -> number of runs, digest of their records
    'baselines': (3, '2ffbcdd919e1b70e96bd2b4391ae36c14641b340316d6b2dcac24c2ee60744d3'),
    'components': (63, 'e27b63a7acb645eca28f1a749f43941581c71a7ac6e03910e434f2b3cbb3ecb4'),
    'components-animals': (18, 'eed9abb3fabb33167496eea7f11e69bbe229ee4f57d0b8b8fc16aff9b5bcf683'),
    'components-calm': (18, '4b55b3e046543dc493ca22eba784b310512c82a38a928ba50d09200507b0b0bd'),
    'components-short-animals':
        (18, '8dce749f3484cbe41d47114dcfca8a00dd97f07123f0cc9ec36ec7f99474d3af'),
    'demo': (3, '4dd8ae97496e4310ea17ac949dccdf6c631a4c3b2aafea4189e2c8fec1d65a3e'),
    'irn': (3, 'be33d7554db3183dd81448ee944a584b030ae974100fb70d7c64debcbec443a7'),
    'k': (18, '5d48dec5fee01b390c794b6019812abd9efeb65839bc257177ba7c57a510a1db'),
    'k-animals': (4, '065553951f4a06f88fcd60aeda50e86eb6c7d789704afe5df7c073d6612c43f7'),
    'longer': (27, 'dac22dc02eecf4bc38d8f4f942c3c631ecd8b728cec354afd9e0807b4e1b72c6'),
    'longer-animals': (24, '205c4a96bc68633da362089f76aac39adf3c2011b040f0f9aabd46c436d7e5bd'),
    'options': (48, 'c6ce55d9c698b2225ad2802a0c109f838951077cf8737ff9a37ce498160e6d05'),
    'presets': (93, 'def7920e1c1fc9be160b0dc0d38ec5bb73756e5acf19b8583d91da02670fc541'),
    'refinement': (33, 'c9e94c3c9740d3629cf40b76a6e98a218b06ae1c3136b37795e6b8c659c2cd4b'),
    'segmentation': (24, '77d0095100c71258efaa17dbdfd03598d37b2b0f7015f47db5fc8996fd785d3b'),
    'transforms': (15, '50d8edb8d4bd11387b4b1954321b152e89bd65fb5047d1845135e492f671c2c0'),
    'tuning-animals': (34, 'cb6879f8abdc8e8b694c8faa93e622702c9220f2f4a7842aef86252fd8be6d2e'),
    'variance': (114, '65ceadb918d7964d754a6d2d900711080c72889c169502dea9d7d9e524395f60'),
    'voc-animals': (7, '7449a1f0b3599e901609ff23f92e154844b246ab9a2702811556b4489822a78d'),
}


def read_folders(sweep):
    "The records of a sweep as its runs left them: name -> what is in the files."
    folders = RESULTS.glob(f'{sweep}-seed*' if sweep in SINGLE_RUNS else f'{sweep}/*')
    found = {}
    for folder in folders:
        name = folder.name.removeprefix(f'{sweep}-') if sweep in SINGLE_RUNS else folder.name
        found[name] = {f.stem: json.loads(f.read_text()) for f in folder.glob('*.json')}
    return found


def digest(records):
    "SHA-256 over canonical JSON: equal exactly when every name and every number is."
    text = json.dumps(records, sort_keys=True, separators=(',', ':'))
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize('sweep', DIGESTS)
def test_history_is_kept_bit_for_bit(sweep):
    records = read_folders(sweep)
    assert all(('settings' in r) == (sweep not in BY_HAND) for r in records.values())
    assert (len(records), digest(records)) == DIGESTS[sweep]


def test_every_sweep_has_its_digest():
    found = {re.sub('-seed[0-9]$', '', folder.name) for folder in RESULTS.iterdir()}
    assert found == {*DIGESTS}
