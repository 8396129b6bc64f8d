"Where networks begin: the right file, in the right place, for the network; no silent download."
import hashlib
from dataclasses import replace
from pathlib import Path
import pytest
import timm
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_backbones import SMALL, as_released, camnet, mxnet_names, randomise, write_params
from torchvision import models
from ppc import methods, sources, work
from ppc.backbones import TINY_START, ResNet, ResNet38, Timm, build_backbone
from ppc.data import DataError
from ppc.lite import LITE_FILES
from ppc.methods import find_method
from ppc.parameters import Config
from ppc.sources import (
    WEIGHT_SOURCES,
    Start,
    check_start,
    conversion_record,
    convert,
    fetch,
    file_of,
    hashes_of,
    known_source,
    pretrain_tiny,
    required_starts,
    sources_table,
    start_for,
    verify,
    weights_table,
)

SEAM = '''
out: runs/seam
methods: [seam+ppc]
backbone: resnet38
weights: weights/ilsvrc-cls_rna-a1_cls1000_ep-0001.params
refine: psa
'''
EPS = SEAM.replace('psa', 'crf') + 'seg_backbone: resnet101\nseg_weights: IMAGENET1K_V1\n'
OWN = '''
backbone: resnet50
weights: hub
output_stride: 16
refine: irn
refine_backbone: mobilenetv2_100
segmenter: none
'''
PARAMS = 'ilsvrc-cls_rna-a1_cls1000_ep-0001.params'
DOWNLOADERS = (
    'torchvision.models._api.load_state_dict_from_url', 'torch.hub.download_url_to_file',
    'timm.models.load_pretrained')


def config_of(text):
    "The parameters of a run from the text of its YAML file."
    found = yaml.safe_load(text) or {}
    return Config.from_flat(**{k: v for k, v in found.items() if k not in ('out', 'methods')})


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    "Empty caches, and no connection."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path/'hf'))
    def refuse(*a, **kw):
        raise OSError('no route')
    for name in (*DOWNLOADERS, 'urllib.request.urlopen'):
        monkeypatch.setattr(name, refuse)


@pytest.fixture(scope='module')
def small():
    return randomise(ResNet38(shrink=SMALL)).eval()


@pytest.fixture(scope='module')
def full():
    "Names and shapes of the real one."
    with torch.device('meta'):
        return ResNet38().state_dict()


def known(monkeypatch, **changes):
    "Change what is known of one file."
    s = next(s for s in WEIGHT_SOURCES if s.file == changes['file'])
    changed = tuple(replace(x, **changes) if x is s else x for x in WEIGHT_SOURCES)
    monkeypatch.setattr(sources, 'WEIGHT_SOURCES', changed)


# --- the list -------------------------------------------------------------------------------------

def test_what_is_known_is_well_formed():
    files = [s.file for s in WEIGHT_SOURCES if s.file]
    assert len(set(files)) == len(files) and len(sources_table()) == len(WEIGHT_SOURCES)
    for s in WEIGHT_SOURCES:
        assert len(s.sha256) in (0, 8, 64) and len(s.md5) in (0, 32)
        assert not set(s.sha256 + s.md5) - set('0123456789abcdef')
        assert s.backbone in ('resnet38', 'resnet50', 'resnet101', 'tiny', *LITE_FILES)
        assert s.learned and s.where
        assert not s.file.startswith('/')
        if len(s.sha256) == 8:
            assert s.file == f'{s.backbone}-{s.sha256}.pth'


@pytest.mark.parametrize('name', ['resnet50', 'resnet101'])
def test_torchvisions_files_are_those_that_the_networks_ask_for(name, monkeypatch):
    asked = []
    def spy(url, **kw):
        asked.append(Path(url).name)
        assert kw['check_hash'] and kw['weights_only']
        return getattr(models, name)().state_dict()
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', spy)
    for served in ('hub', 'IMAGENET1K_V1'):
        with torch.device('meta'):
            ResNet(name, 16, served)
    served = [s for s in WEIGHT_SOURCES if s.served in ('hub', 'IMAGENET1K_V1')]
    files = {(s.backbone, s.served): s.file for s in served}
    assert asked == [files[name, 'hub'], files[name, 'IMAGENET1K_V1']]


# --- the right file -------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [0, 1, 2**20 - 1, 2**20, 2**21 + 5])
def test_hashes(size, tmp_path):
    data = bytes(i*i % 251 for i in range(1000))*(size//1000 + 1)
    (tmp_path/'f').write_bytes(data[:size])
    want = {kind: hashlib.new(kind, data[:size]).hexdigest() for kind in ('sha256', 'md5')}
    assert hashes_of(tmp_path/'f') == want


def test_big_files_show_a_bar(tmp_path, monkeypatch, capfd):
    (tmp_path/'f').write_bytes(bytes(3000))
    hashes_of(tmp_path/'f')
    assert capfd.readouterr().err == ''
    monkeypatch.setattr(sources, 'BIG', 3000)
    hashes_of(tmp_path/'f')
    assert 'hash of f' in capfd.readouterr().err


@pytest.mark.parametrize('kind', ['sha256', 'md5'])
def test_every_known_digit_of_a_hash_counts(kind, tmp_path):
    path = tmp_path/PARAMS
    path.write_bytes(b'weights')
    true = hashlib.new(kind, b'weights').hexdigest()
    empty = replace(WEIGHT_SOURCES[0], sha256='', md5='')
    for good in (true, true[:8], ''):
        assert verify(path, replace(empty, **{kind: good}))[kind] == true
    for bad in (true[:-1] + 'x', true[:7] + 'x', 'f'*len(true)):
        with pytest.raises(DataError, match='damaged, or another') as e:
            verify(path, replace(empty, **{kind: bad}))
        assert str(path) in str(e.value) and true in str(e.value) and bad in str(e.value)


def test_a_hash_belongs_to_a_name(tmp_path):
    path = tmp_path/'mine.params'
    path.write_bytes(b'weights')
    verify(path, WEIGHT_SOURCES[0])
    verify(path)


# --- what a run needs -----------------------------------------------------------------------------

def test_needed():
    params = f'weights/{PARAMS}'
    def starts(text):
        return required_starts(config_of(text))
    everything = 'CAMs', 'affinities', 'segmenter'
    assert starts(SEAM) == [Start(n, 'resnet38', params, 8) for n in everything]
    assert starts(EPS) == [
        Start('CAMs', 'resnet38', params, 8), Start('segmenter', 'resnet101', 'IMAGENET1K_V1', 8)]
    assert starts(OWN) == [
        Start('CAMs', 'resnet50', 'hub', 16), Start('affinities', 'mobilenetv2_100', '', 16)]
    assert starts('') == [Start('CAMs', 'tiny', '', 8), Start('segmenter', 'tiny', '', 8)]
    with pytest.raises(ValueError, match='did you mean'):
        starts('backbon: tiny')


PARAMETERS = st.fixed_dictionaries({}, optional=dict(
    weights=st.sampled_from(['', 'a.pth']),
    output_stride=st.sampled_from([8, 16]),
    refine=st.sampled_from(['none', 'crf', 'psa', 'irn']),
    refine_backbone=st.sampled_from(['', 'tiny', 'resnet50']),
    refine_weights=st.sampled_from(['', 'b.pth']),
    segmenter=st.sampled_from(['none', 'aspp', 'largefov']),
    seg_backbone=st.sampled_from(['', 'tiny', 'resnet101']),
    seg_weights=st.sampled_from(['', 'c.pth'])))

@given(PARAMETERS)
def test_a_run_builds_what_is_needed(parameters):
    "The same (backbone, weights, output stride) that the stages hand to `build_backbone`."
    config, built = Config.from_flat(**parameters), []
    def spy(name, output_stride, weights):
        built.append((name, weights, output_stride))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(methods, 'build_backbone', spy)
        m.setattr(methods, 'CamNet', lambda *a, **kw: None)
        for name in ('AffinityNet', 'IRNet', 'deeplab'):
            m.setattr(work, name, lambda *a, **kw: None)
        methods.make_camnet(config, 7, find_method('cam'))
        if work.affinity_options(config):
            work.make_affinity_net(config)
        if config.segment.segmenter != 'none':
            work.make_segmenter(config, 7)
    assert [s[1:] for s in required_starts(config)] == built


def test_the_table_says_what_is_missing(monkeypatch):
    checked = []
    real = sources.check_start
    def spy(start):
        checked.append(start)
        return real(start)
    monkeypatch.setattr(sources, 'check_start', spy)
    t = weights_table({'seam': config_of(SEAM), 'eps': config_of(EPS), 'own': config_of(OWN)})
    assert t[['run', 'network']].values.tolist() == [
        ['seam', 'CAMs'], ['seam', 'affinities'], ['seam', 'segmenter'],
        ['eps', 'CAMs'], ['eps', 'segmenter'],
        ['own', 'CAMs'], ['own', 'affinities']]
    assert t.ready.tolist() == [False]*6 + [True] and len(checked) == 3
    assert 'ademxapp' in t.remark[0] and f'weights/{PARAMS} is missing' in t.remark[0]
    assert 'fetch resnet101-63fe2227.pth' in t.remark[4]
    assert 'fetch resnet50-11ad3fa6.pth' in t.remark[5] and t.remark[6] == 'random'
    assert t.learned.tolist()[-3:] == [
        'ImageNet-1k (IMAGENET1K_V1)', 'ImageNet-1k (IMAGENET1K_V2)', 'nothing']


# --- ready? ---------------------------------------------------------------------------------------

def test_missing_files():
    with pytest.raises(DataError, match='runs/x.pth is missing: give the path'):
        check_start(Start('CAMs', 'resnet50', 'runs/x.pth'))
    with pytest.raises(DataError, match='elsewhere/ilsvrc.* is missing. Get it from .*ademxapp'):
        check_start(Start('CAMs', 'resnet38', f'elsewhere/{PARAMS}'))
    with pytest.raises(DataError, match='hub is missing'):
        check_start(Start('CAMs', 'resnet38', 'hub'))
    with pytest.raises(DataError, match='timm publishes no weights'):
        check_start(Start('CAMs', 'resnett', 'hub'))
    with pytest.raises(DataError, match='ppc weights fetch mobilenetv2_100'):
        check_start(Start('CAMs', 'mobilenetv2_100', 'hub'))


def test_a_file_of_another_network_names_the_first_tensor(small, tmp_path):
    path = tmp_path/'w.safetensors'
    save_file(small.state_dict(), path)
    shapes = r'conv1a\.weight as \(4, 3, 3, 3\), this network needs \(64, 3, 3, 3\)'
    for backbone, words in {
            'resnet38': shapes,
            'resnet50': r'lacks the tensor conv1\.weight',
            'mobilenetv2_100': r'lacks the tensor conv_stem\.weight'}.items():
        with pytest.raises(DataError, match=rf'w\.safetensors .*{words}'):
            check_start(Start('CAMs', backbone, str(path)))
    path.write_bytes(b'no tensors')
    for backbone in ('resnet38', 'resnet50'):
        with pytest.raises(DataError, match=r'w\.safetensors cannot be read'):
            check_start(Start('CAMs', backbone, str(path)))


def test_a_file_that_fits_and_nothing_is_allocated(tmp_path, monkeypatch, recwarn):
    torch.save(timm.create_model('resnet18').state_dict(), tmp_path/'w.pth')
    built, real = [], sources.build_backbone
    def spy(*args):
        built.append(real(*args))
        return built[-1]
    monkeypatch.setattr(sources, 'build_backbone', spy)
    start = Start('CAMs', 'resnet18', str(tmp_path/'w.pth'), 8)
    assert check_start(start) == 'there, SHA-256 not known, tensors fit'
    assert isinstance(built[0], Timm) and all(p.is_meta for p in built[0].parameters())
    assert not [w for w in recwarn if 'meta' in str(w.message)]
    torch.save(timm.create_model('vit_tiny_patch16_224').state_dict(), tmp_path/'vit.pth')
    with pytest.raises(ValueError, match='has output stride 16, asked for is 8'):
        check_start(Start('CAMs', 'vit_tiny_patch16_224', str(tmp_path/'vit.pth'), 8))


def test_the_real_resnet38_and_one_that_is_nearly(full, tmp_path, monkeypatch):
    "Shapes alone: 436 MB are too much for a test. The file is there, its arrays are in a list."
    arrays = mxnet_names(full)
    (tmp_path/'weights').mkdir()
    (tmp_path/'weights'/PARAMS).write_bytes(b'MXNet')
    hashes = {k: hashlib.new(k, b'MXNet').hexdigest() for k in ('sha256', 'md5')}
    monkeypatch.setattr('ppc.backbones.read_mxnet', lambda path: dict(arrays))
    start = required_starts(config_of(SEAM))[0]
    right = 'f668a2add80e33dfa8f1a0695df91f6d8cfad5ffbb26d1dc7bcd35903a1f6e16'
    words = f'has the sha256 {hashes["sha256"]}, it should have {right}'
    with pytest.raises(DataError, match=words):
        check_start(start)
    known(monkeypatch, file=PARAMS, **hashes)
    assert check_start(start) == 'there, SHA-256 fits, tensors fit'
    arrays['arg:res5a_branch2b1_weight'] = torch.empty(1, device='meta')
    shapes = r'as \(1,\), this network needs \(1024, 512, 3, 3\)'
    with pytest.raises(DataError, match=rf'{PARAMS} has b5\.conv_branch2b1\.weight {shapes}'):
        check_start(start)
    table = weights_table({'seam': config_of(SEAM)})
    assert not table.ready.any() and table.remark.str.contains('b5.conv_branch2b1').all()
    assert (table.learned == 'ImageNet-1k').all()


def test_the_size_on_record(full):
    "Of MXNet's oldest format, array by array."
    arrays = mxnet_names(full) | {
        'arg:linear1000_weight': torch.empty(1000, 4096, device='meta'),
        'arg:linear1000_bias': torch.empty(1000, device='meta')}
    size = 3*8 + 8
    for name, t in arrays.items():
        n = 1
        for s in t.shape:
            n *= s
        size += 4 + 4*len(t.shape) + 3*4 + 4*n + 8 + len(name.encode())
    assert size == 436_873_620 and round(size/2**20, 2) == WEIGHT_SOURCES[0].mib


# --- fetching -------------------------------------------------------------------------------------

def downloader(content, asked, state):
    "torchvision's, without a network: the file goes where torch.hub would have put it."
    def get(url, check_hash=False, weights_only=False, **kw):
        asked.append(url)
        assert check_hash and weights_only
        path = Path(torch.hub.get_dir())/'checkpoints'/Path(url).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return state
    return get


@pytest.mark.parametrize('file, served', [
    ('resnet50-11ad3fa6.pth', 'hub'), ('resnet50-0676ba61.pth', 'IMAGENET1K_V1')])
def test_torchvisions_weights_are_fetched_once_and_checked(file, served, monkeypatch):
    with torch.device('meta'):
        state = models.resnet50().state_dict()
    asked, start = [], start_for(file)
    assert start == Start('', 'resnet50', served)
    monkeypatch.setattr(DOWNLOADERS[0], downloader(b'fetched', asked, state))
    sha, digits = hashlib.sha256(b'fetched').hexdigest(), file[9:17]
    with pytest.raises(DataError, match=f'{file} has the sha256 {sha}, it should have {digits}'):
        fetch(start)
    known(monkeypatch, file=file, sha256=sha[:8])
    assert fetch(start) == check_start(start) == 'there, SHA-256 fits in its first 8 digits'
    assert len(asked) == 1 and asked[0].endswith(file)
    assert file_of(start).read_bytes() == b'fetched'
    file_of(start).write_bytes(b'fetch')  # half of it, found in the cache
    with pytest.raises(DataError, match='Delete it and fetch it again'):
        fetch(start)


def test_timms_weights_are_fetched_by_timm(monkeypatch, tmp_path):
    asked, start = [], start_for('mobilenetv2_100')
    repository = tmp_path/'hf'/'models--timm--mobilenetv2_100.ra_in1k'
    revision = repository/'snapshots'/'abc'
    def get(net):
        asked.append(net.pretrained_cfg['hf_hub_id'])
        revision.mkdir(parents=True)  # as Hugging Face's cache is laid out
        (repository/'refs').mkdir()
        (repository/'refs'/'main').write_text('abc')
        (revision/'model.safetensors').write_bytes(b'x')
    monkeypatch.setattr('timm.models.load_pretrained', get)
    assert start == Start('', 'mobilenetv2_100', 'hub') and file_of(start) is None
    assert fetch(start) == fetch(start) == 'there, SHA-256 not known'
    assert asked == ['timm/mobilenetv2_100.ra_in1k']
    assert file_of(start) == revision/'model.safetensors'
    source = known_source(start)
    assert source.learned == 'timm: ra_in1k' and source.licence == 'apache-2.0'


@pytest.mark.parametrize('name', ['resnet50', 'resnet101-63fe2227.pth', 'mobilenetv2_100'])
def test_without_a_connection_the_error_says_so(name):
    with pytest.raises(DataError, match=r'could not be fetched \(no route\): connect'):
        fetch(start_for(name))


@pytest.mark.parametrize('name', [
    'resnet38', PARAMS, 'resnet38_SEAM.pth', 'resnet101-5d3b4d8f.pth'])
def test_nothing_else_is_fetched(name, monkeypatch):
    def never(*a, **kw):
        raise AssertionError('a download')
    for target in DOWNLOADERS:
        monkeypatch.setattr(target, never)
    with pytest.raises(DataError, match=r'weights/\S+ is missing\. Get it from'):
        fetch(start_for(name))


@pytest.mark.parametrize('name', ['', 'small', 'resnet', 'no such network', '../x.pth'])
def test_unknown_names(name):
    with pytest.raises(DataError, match='none of the known files'):
        start_for(name)


# --- converting -----------------------------------------------------------------------------------

def test_params_convert_to_the_same_network(small, tmp_path):
    original, made = tmp_path/'r38.params', tmp_path/'out'/'r38.safetensors'
    head = {'arg:linear1000_weight': torch.randn(1000, 8), 'arg:linear1000_bias': torch.randn(1000)}
    write_params(original, mxnet_names(small.state_dict()) | head, 'legacy')
    sha = hashlib.sha256(original.read_bytes()).hexdigest()
    record = {'network': 'resnet38', 'source': 'r38.params', 'sha256': sha}
    assert convert(original, made, SMALL) == conversion_record(made) == record
    want = {k: v for k, v in small.state_dict().items() if 'num_batches' not in k}
    got = load_file(made)
    assert set(got) == set(want) and all(torch.equal(got[k], want[k]) for k in want)
    image = torch.randn(2, 3, 40, 32, generator=torch.Generator().manual_seed(1))
    for a, b in zip(ResNet38(made, SMALL).eval()(image), small(image)):
        assert torch.equal(a, b)
    convert(made, tmp_path/'again.safetensors', SMALL)  # the new file can be converted, too
    assert all(torch.equal(v, want[k]) for k, v in load_file(tmp_path/'again.safetensors').items())


def test_a_released_checkpoint_leaves_its_heads_behind(tmp_path):
    net = camnet(1)
    torch.save(as_released(net, prefix='module.'), tmp_path/'resnet38_SEAM.pth')
    convert(tmp_path/'resnet38_SEAM.pth', tmp_path/'r38.safetensors', SMALL)
    ours = ResNet38(tmp_path/'r38.safetensors', SMALL).state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in net.backbone.state_dict().items())
    start = Start('CAMs', 'resnet38', str(tmp_path/'r38.safetensors'))
    assert "VOC's tags" in known_source(start).learned


def test_a_converted_file_remembers_the_hash(tmp_path, monkeypatch):
    path = tmp_path/'r38.safetensors'
    monkeypatch.setattr(sources, '_build', lambda start: None)  # tensors are not the question here
    config = Config.from_flat(backbone='resnet38', weights=str(path), segmenter='none')
    for sha, words in (
            (WEIGHT_SOURCES[0].sha256, 'made from .*params, whose SHA-256 fits, tensors fit'),
            ('0'*64, 'was made from another .*params: with the sha256 000')):
        record = dict(network='resnet38', source=PARAMS, sha256=sha)
        save_file({'a': torch.ones(1)}, path, record)
        table = weights_table({'r': config})
        assert table.remark.str.contains(words).all() and table.ready.all() == (sha != '0'*64)
        assert table.learned[0] == 'ImageNet-1k'


def lose_an_array(arrays):
    arrays.pop('arg:res3b2_branch2a_weight')

def reshape_an_array(arrays):
    arrays['aux:bn7_moving_var'] = torch.ones(3)

def add_an_array(arrays):
    arrays['arg:res9a_branch2a_weight'] = torch.ones(3)

def add_a_strange_array(arrays):
    arrays['arg:fc6_weight'] = torch.ones(3)


@pytest.mark.parametrize('spoil, words', [
    (lose_an_array, r'r38\.params lacks the tensor b3_2\.conv_branch2a\.weight'),
    (reshape_an_array, r'r38\.params has bn7\.running_var as \(3,\), this network needs \(256,\)'),
    (add_an_array,
     r'r38\.params has the tensor b9\.conv_branch2a\.weight, which this network lacks'),
    (add_a_strange_array, "'arg:fc6_weight' is no array of ResNet38")])
def test_what_does_not_fit_is_not_converted(small, spoil, words, tmp_path):
    arrays = mxnet_names(small.state_dict())
    spoil(arrays)
    write_params(tmp_path/'r38.params', arrays)
    with pytest.raises(DataError, match=words):
        convert(tmp_path/'r38.params', tmp_path/'r38.safetensors', SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['r38.params']


def test_other_refusals(small, tmp_path):
    write_params(tmp_path/PARAMS, mxnet_names(small.state_dict()))
    with pytest.raises(DataError, match='has the sha256 .* it should have f668a2ad'):
        convert(tmp_path/PARAMS, tmp_path/'r38.safetensors', SMALL)
    whole = (tmp_path/PARAMS).read_bytes()
    (tmp_path/'cut.params').write_bytes(whole[:len(whole)//2])
    with pytest.raises(DataError, match=r'cut\.params at byte'):
        convert(tmp_path/'cut.params', tmp_path/'r38.safetensors', SMALL)
    with pytest.raises(DataError, match='none.params is missing'):
        convert(tmp_path/'none.params', tmp_path/'r38.safetensors')
    with pytest.raises(DataError, match=r'should end in \.safetensors'):
        convert(tmp_path/'cut.params', tmp_path/PARAMS)
    assert (tmp_path/PARAMS).read_bytes() == whole and not (tmp_path/'r38.safetensors').exists()


# --- the tiny network's start ---------------------------------------------------------------------

def test_the_packages_start_is_the_recorded_one():
    start = Start('', 'tiny', 'closeups', 8)
    assert start_for('tiny') == Start('', 'tiny', 'closeups')
    assert check_start(start) == 'there, SHA-256 fits, tensors fit'
    assert TINY_START.stat().st_size < 2*2**20
    assert conversion_record(TINY_START) == {'closeups': '20000', 'epochs': '2', 'seed': '99'}


@pytest.mark.slow
def test_a_start_is_made_from_close_ups(tmp_path):
    record = pretrain_tiny(tmp_path/'tiny.safetensors', closeups=64, epochs=1, seed=3)
    assert conversion_record(tmp_path/'tiny.safetensors') == record
    assert record == {'closeups': '64', 'epochs': '1', 'seed': '3'}
    state = load_file(tmp_path/'tiny.safetensors')
    assert state.keys() == load_file(TINY_START).keys()
    net = build_backbone('tiny', 8, str(tmp_path/'tiny.safetensors'))
    assert all(torch.equal(v, state[f'backbone.{k}']) for k, v in net.state_dict().items())
