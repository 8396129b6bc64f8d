"From tagged images to masks; and what happens when something is wrong, damaged or interrupted."
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
import numpy as np
import papermill
import pytest
import timm
import torch
import yaml
from filelock import FileLock
from PIL import ExifTags, Image
from safetensors.torch import save_file
from torch.nn.functional import cosine_similarity, multilabel_soft_margin_loss
from typer.testing import CliRunner
from ppc import cli, planning, work
from ppc.backbones import BACKBONES, Backbone, Tiny, build_backbone
from ppc.cli import run_summary
from ppc.contrast import READINGS
from ppc.data import DataError, TagFolder, normalise, read_mask
from ppc.deeplab import RECIPES
from ppc.inference import group_by_size, read_cam
from ppc.irn import IRN_PRESETS
from ppc.methods import CHANCE_SOURCES, INIT_PARTS, METHODS, Method, find_method, make_camnet
from ppc.parameters import Config, modern, parse_yaml, preset
from ppc.pipeline import provenance, run
from ppc.psa import PSA_PRESETS
from ppc.report import find_runs, gallery, report_page
from ppc.stages import Stage, stages
from ppc.training import read_log
from ppc.weights import read_weights
from ppc.work import DECAY, RANKS, Inputs, fit_classifier, read_json, train_cam

pytestmark = pytest.mark.slow

QUICK = dict(
    batch_size=4, warm_epochs=1, crop=64, target=32, resize=[64, 96], k=4,
    seg_options=dict(batch_size=4, epochs=1, crop=64))
TWO = ['cam', 'seam+ppc']


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    "A finished run of two methods."
    out = tmp_path_factory.mktemp('runs')/'done'
    return out, run(out, TWO, data=str(scenes), **QUICK)


def test_every_stage_reports(done, scenes):
    out, result = done
    assert {*result['seed_miou']} == {*TWO} and result['segmentation_miou'] is not None
    listed = [s.name for s in stages(Config.from_flat(data=str(scenes), **QUICK), TWO)]
    assert {'warm', 'cam/train', 'cam/crf', 'best', 'masks', 'segmentation'} <= {*listed}
    for stage in (*listed, '.'):
        assert (out/stage/'metrics.json').is_file() and (out/stage/'config.json').is_file()
    assert [s['name'] for s in read_json(out/'stages.json')] == listed
    assert result == read_json(out/'metrics.json') and result['parameters']['k'] == 4
    assert result['versions']['torch']
    for i in TagFolder(scenes).ids:
        assert read_mask(out/'masks'/f'{i}.png').shape == (128, 128)
    assert len(list((out/'segmentation').glob('*.png'))) == 4


def test_again_does_nothing(done, scenes, monkeypatch):
    out, result = done
    monkeypatch.setattr(work, 'fit', None)
    assert run(out, TWO, data=str(scenes), **QUICK) == result


def test_lost_stage_is_done_again(done, scenes, tmp_path):
    "Without its metrics.json a stage is not done, whatever else it left."
    shutil.copytree(done[0], tmp_path/'run')
    for stage in ('.', 'masks'):
        (tmp_path/'run'/stage/'metrics.json').unlink()
    lost = tmp_path/'run'/'masks'/'train00000.png'
    lost.unlink()
    again = run(tmp_path/'run', TWO, data=str(scenes), **QUICK)
    assert lost.is_file()
    for name in ('seed_miou', 'mask_miou'):
        assert again[name] == done[1][name]


def test_same_seed_same_numbers(done, scenes, tmp_path):
    again = run(tmp_path/'again', TWO, data=str(scenes), **QUICK)
    for k in ('seed_miou', 'seed_crf_miou', 'mask_miou', 'segmentation_miou'):
        assert again[k] == done[1][k]


def test_other_data_is_refused(done, scenes, tmp_path):
    "A stage of the same parameters, and of other tags, photographs or masks."
    shutil.copytree(scenes, tmp_path/'data')
    shutil.copytree(done[0], tmp_path/'run')
    settings = dict(QUICK, data=str(tmp_path/'data'))
    for name in ('config.json', 'metrics.json'):  # the dataset has moved
        (tmp_path/'run'/name).unlink()
    assert run(tmp_path/'run', TWO, **settings)['table'] == done[1]['table']
    (tmp_path/'run'/'metrics.json').unlink()
    tags = tmp_path/'data'/'tags.csv'
    first, second, *rest = tags.read_text().splitlines()
    tags.write_text('\n'.join([first, f'{second.split(",")[0]},', *rest]) + '\n')
    with pytest.raises(ValueError, match='list train'):
        run(tmp_path/'run', TWO, **settings)


# --- data that changed ----------------------------------------------------------------------------

def add_photograph(data, name='a5', split='train'):
    for folder, ending in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
        shutil.copy(data/folder/f'train00001.{ending}', data/folder/f'{name}.{ending}')
    for file, line in ((data/'tags.csv', f'{name},cat\n'), (data/f'ImageSets/{split}.txt', name)):
        file.write_text(file.read_text().rstrip('\n') + f'\n{line}')


def retag(data):
    rows = (data/'tags.csv').read_text().splitlines()
    rows[3] = 'train00002,' if rows[3] != 'train00002,' else 'train00002,cat'
    (data/'tags.csv').write_text('\n'.join(rows) + '\n')


def shrink_list(data):
    path = data/'ImageSets'/'train.txt'
    path.write_text(''.join(path.read_text().splitlines(keepends=True)[1:]))


def turn_list(data):
    path = data/'ImageSets'/'train.txt'
    path.write_text('\n'.join(path.read_text().split()[::-1]) + '\n')


def rename_class(data):
    for file in ('classes.txt', 'tags.csv'):
        (data/file).write_text((data/file).read_text().replace('panda', 'koala'))


def paint_mask(data):
    Image.new('L', (128, 128)).save(data/'SegmentationClass'/'train00004.png')


CHANGED = [
    (add_photograph, r'photographs added: 1 \(a5\)'), (retag, r'tags changed: 1 \(train00002\)'),
    (shrink_list, r'photographs removed: 1 \(train00000\)'), (turn_list, 'order of the images'),
    (rename_class, 'classes: .*panda.*, now .*koala'), (paint_mask, r'masks changed: 1'),
    (lambda data: [add_photograph(data, f'a{n}') for n in range(5)],
     r'photographs added: 5 \(a0, a1, a2, ...\)')]
MASKS = dict(batch_size=4, crop=64, target=32, resize=[64, 96], k=4, crf=False, segmenter='none')


@pytest.fixture(scope='module')
def masked(scenes, tmp_path_factory):
    "A dataset, and a finished run of it that ends with pseudo masks."
    root = tmp_path_factory.mktemp('masked')
    shutil.copytree(scenes, root/'data')
    run(root/'run', ['cam', 'seam'], data=str(root/'data'), **MASKS)
    return root


@pytest.fixture
def again(masked, tmp_path):
    "A copy of them, and a function that runs it again."
    shutil.copytree(masked, tmp_path, dirs_exist_ok=True)
    settings = dict(MASKS, data=str(tmp_path/'data'))
    run(tmp_path/'run', ['cam', 'seam'], **settings)  # the dataset has moved

    def call(methods=('cam', 'seam'), **more):
        return run(tmp_path/'run', methods, **{**settings, **more})
    return call


@pytest.mark.parametrize('finished', [True, False])
@pytest.mark.parametrize('change, words', CHANGED)
def test_changed_data_are_named(again, tmp_path, change, words, finished, monkeypatch):
    "Whether the run is finished or not; nothing is trained, nothing written, nothing lost."
    if not finished:
        for stage in ('.', 'masks', 'seam/train'):
            (tmp_path/'run'/stage/'metrics.json').unlink()
    change(tmp_path/'data')
    monkeypatch.setattr(work, 'fit', None)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'run').rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match=f'list train: .*{words}.* --fresh-from train '):
        again()
    with pytest.raises(ValueError, match='--fresh-from train '):  # too late a stage
        again(fresh_from='masks')
    after = {f: f.stat().st_mtime_ns for f in (tmp_path/'run').rglob('*') if f.is_file()}
    assert before == after


def test_fresh_from_does_a_stage_and_what_depends_on_it(again, tmp_path, monkeypatch):
    trained, fit = [], work.fit

    def counted(*args, **options):
        trained.append(options['label'])
        return fit(*args, **options)
    monkeypatch.setattr(work, 'fit', counted)
    kept = (tmp_path/'run'/'cam'/'train'/'weights.safetensors').stat().st_mtime_ns
    again(fresh_from='seam/train')
    assert trained == ['seam']
    again(fresh_from=['cam/seeds', 'seam/seeds'])
    assert trained == ['seam']
    assert (tmp_path/'run'/'cam'/'train'/'weights.safetensors').stat().st_mtime_ns == kept
    add_photograph(tmp_path/'data')
    found = again(fresh_from='train')
    assert trained == ['seam', 'cam', 'seam'] and (tmp_path/'run'/'masks'/'a5.png').is_file()
    assert found['table'][0]['images'] == 17 and again() == found
    with pytest.raises(ValueError, match="no stage 'trian': choose from cam/train"):
        again(fresh_from='trian')


def test_a_list_that_later_stages_read(again, tmp_path):
    "The stages before it stay; a list of an earlier edition's run is named without its images."
    again(segmenter='largefov', seg_options=SMALL)
    kept = (tmp_path/'run'/'segmenter'/'weights.safetensors').stat().st_mtime_ns
    add_photograph(tmp_path/'data', 'v1', 'val')
    settings = dict(segmenter='largefov', seg_options=SMALL)
    with pytest.raises(ValueError, match=r'list val: photographs added: 1 \(v1\)\).*segmentation '):
        again(**settings)
    (tmp_path/'run'/'lists.json').unlink()
    with pytest.raises(ValueError, match='list val: photographs, tags, classes'):
        again(**settings)
    assert again(**settings, fresh_from='segmentation')['table'][-1]['images'] == 5
    assert (tmp_path/'run'/'segmenter'/'weights.safetensors').stat().st_mtime_ns == kept


def test_changed_data_in_runs_that_share(mine, tmp_path):
    "The stages of the old data stay for other runs, and are not read any more."
    settings = dict(MASKS, data=str(mine), shared=str(tmp_path/'shared'))
    for out in ('a', 'b'):
        run(tmp_path/out, ['cam'], **settings)
    add_photograph(mine)
    with pytest.raises(ValueError, match=r'photographs added: 1 \(a5\)'):
        run(tmp_path/'a', ['cam'], **settings)
    found = run(tmp_path/'a', ['cam'], **settings, fresh_from='train')
    assert found['table'][0]['images'] == 17 and (tmp_path/'a'/'masks'/'a5.png').is_file()
    assert (tmp_path/'a'/'masks').resolve() != (tmp_path/'b'/'masks').resolve()
    assert len(list((tmp_path/'b'/'masks').glob('*.png'))) == 16
    fresh = run(tmp_path/'c', ['cam'], **settings)
    assert fresh['table'] == found['table']


def test_a_finished_run_outlives_its_dataset(again, tmp_path):
    found = again()
    shutil.rmtree(tmp_path/'data')
    assert again() == found


def test_a_finished_run_of_an_earlier_edition_is_read(again, tmp_path, monkeypatch):
    "Without a parameter that came later, and with stages that had other keys."
    monkeypatch.setattr(work, 'fit', None)
    found, path = again(), tmp_path/'run'/'config.json'
    made = read_json(path)
    del made['coats'], made['crf_power']
    path.write_text(json.dumps(made))
    for file in (tmp_path/'run').glob('*/train/config.json'):
        file.write_text(json.dumps({'k': 4}))
    (tmp_path/'run'/'lists.json').unlink()
    assert again() == found


# --- settings that changed ------------------------------------------------------------------------

def test_a_setting_of_a_stage_that_failed_can_be_mended(again, tmp_path):
    "The finished stages stay, the failed one begins again without its checkpoint."
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path/'run').glob('*/**/metrics.json')}
    with pytest.raises(FloatingPointError):
        again(segmenter='largefov', seg_options=dict(SMALL, lr=1e8))
    failed = tmp_path/'run'/'segmenter'
    assert 'FloatingPointError' in (failed/'failed.txt').read_text()
    (failed/'checkpoint.pt').write_bytes(b'of the failed training')
    with pytest.warns(UserWarning, match='segmenter is begun again, .* lr = 100000000.0, now'):
        again(segmenter='largefov', seg_options=SMALL)
    assert not (failed/'failed.txt').exists()
    assert kept == {f: f.stat().st_mtime_ns for f in kept}


def test_a_stopped_training_is_not_dropped(again, tmp_path):
    "Its checkpoint may be hours of work; nor is what a failure elsewhere left."
    for stage in ('.', 'masks', 'best', 'seam/seeds', 'seam/cams-train', 'seam/train'):
        (tmp_path/'run'/stage/'metrics.json').unlink()
    assert (tmp_path/'run'/'seam'/'train'/'checkpoint.pt').is_file()
    with pytest.raises(ValueError, match='map_stride = 4, now map_stride = 2: .*seam/train'):
        again(map_stride=2)
    again(map_stride=2, fresh_from='seam/train')
    assert read_json(tmp_path/'run'/'config.json')['map_stride'] == 2


@pytest.mark.parametrize('change, fresh', [
    (dict(tau=.2), ()), (dict(val_split=''), ()), (dict(workers=1), ()),
    (dict(threshold=.3), 'best'), (dict(methods=['cam', 'seam', 'cam+ppc']), 'best')])
def test_a_setting_that_nothing_finished_has_read(again, change, fresh, tmp_path):
    "Of a finished run, too: what is done stays, and the run's record has the new value."
    if fresh:
        with pytest.raises(ValueError, match=f'--fresh-from {fresh} '):
            again(**change)
    kept = tmp_path/'run'/'seam'/'train'/'weights.safetensors'
    written = kept.stat().st_mtime_ns
    found = again(**change, fresh_from=fresh)
    name, = change
    if name == 'workers':  # how a run works is no part of its record
        return
    now = [*found['seed_miou']] if name == 'methods' else found['parameters'][name]
    assert now == change[name] and kept.stat().st_mtime_ns == written


def test_generated_scenes_are_not_mixed(tmp_path):
    settings = dict(ALONE, batch_size=4, crop=64, resize=[64, 96], scenes=12, closeups=32)
    found = run(tmp_path/'run', ['cam'], **settings)
    for change in (dict(scenes=14), dict(zoom=1.5), dict(data=str(tmp_path))):
        name, = change
        with pytest.raises(ValueError, match=f'{name} = .*now {name} = .*another run folder'):
            run(tmp_path/'run', ['cam'], **{**settings, **change})
    assert run(tmp_path/'run', ['cam'], **settings) == found


@pytest.mark.parametrize('change', [dict(k=8), dict(scales=[1.0, 1.5]), dict(seed=1)])
def test_other_parameters_are_refused(done, scenes, change):
    name, = change
    with pytest.raises(ValueError, match=f'{name} = '):
        run(done[0], TWO, data=str(scenes), **{**QUICK, **change})


@pytest.mark.parametrize('stage, name', [
    ('cam/cams-train', 'train00001.npz'), ('masks', 'train00001.png')])
def test_damaged_file_is_named(done, scenes, tmp_path, stage, name):
    shutil.copytree(done[0], tmp_path/'run')
    path = tmp_path/'run'/stage/name
    path.write_bytes(path.read_bytes()[:100])
    for s in ('.', 'cam/seeds', 'seam+ppc/seeds', 'segmenter'):
        (tmp_path/'run'/s/'metrics.json').unlink()
    shutil.rmtree(tmp_path/'run'/'segmenter')
    with pytest.raises(DataError, match=name):
        run(tmp_path/'run', TWO, data=str(scenes), **QUICK)


def test_cam_files_unpickle_nothing(tmp_path):
    np.savez(tmp_path/'a.npz', cam=np.array([{}], dtype=object), present=np.array([1]))
    with pytest.raises(DataError, match='damaged'):
        read_cam(tmp_path/'a.npz')


def test_damaged_metrics_are_named(done, scenes, tmp_path):
    shutil.copytree(done[0], tmp_path/'run')
    (tmp_path/'run'/'metrics.json').write_text('{"seed')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        run(tmp_path/'run', TWO, data=str(scenes), **QUICK)


ALONE = dict(segmenter='none', refine='none', crf=False)
SHARED = dict(
    ALONE, batch_size=4, crop=64, target=32, resize=[64, 96], scenes=12, closeups=32, warm_epochs=1)


def test_runs_share_what_they_have_in_common(tmp_path, monkeypatch):
    "Scenes, starts and the baseline are made once; the numbers are those of a run alone."
    trained, fit, both = [], work.fit, ['seam', 'seam+ppc']

    def counted(*args, **options):
        trained.append(options['label'])
        return fit(*args, **options)
    monkeypatch.setattr(work, 'fit', counted)
    alone = run(tmp_path/'alone', both, **SHARED, k=4)['seed_miou']
    assert trained == ['pretrain', 'cam', 'seam', 'seam+ppc']
    more = dict(SHARED, shared=str(tmp_path/'shared'))
    assert run(tmp_path/'a', both, **more, k=4)['seed_miou'] == alone and trained[4:] == trained[:4]
    assert run(tmp_path/'b', both, **more, k=8)['seed_miou']['seam'] == alone['seam']
    assert trained[8:] == ['seam+ppc']
    found = run(tmp_path/'c', ['seam+ppc'], **more, k=4)
    assert found['seed_miou']['seam+ppc'] == alone['seam+ppc']
    assert len(trained) == 9
    run(tmp_path/'d', ['seam'], **more, seed=1)
    assert trained[9:] == ['pretrain', 'cam', 'seam'] and TagFolder(tmp_path/'d'/'scenes').ids


def test_two_runs_at_once_train_the_baseline_once(tmp_path):
    code = ('import sys; from ppc.pipeline import run; '
            'run(sys.argv[1], ["seam"], shared=sys.argv[2], **eval(sys.argv[3]))')

    def begin(name, alpha):  # a weight of the contrast, which the baseline does not have
        settings = repr({**SHARED, 'warm_epochs': 0, 'alpha': alpha})
        command = [sys.executable, '-c', code, tmp_path/name, tmp_path/'shared', settings]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for p in [begin('a', .1), begin('b', .2)]:
        assert p.communicate()[1] is not None and p.returncode == 0
    assert len([*(tmp_path/'shared').glob('seam-train-*/')]) == 1
    for stage in ('seam/train', 'seam/cams-train', 'seam/seeds'):
        assert (tmp_path/'a'/stage).resolve() == (tmp_path/'b'/stage).resolve()
    a, b = (read_json(tmp_path/n/'metrics.json') for n in ('a', 'b'))
    assert a['seed_miou'] == b['seed_miou']


TRAINING = dict(batch_size=4, crop=64, target=32, k=4)


def trained_weights(folder, scenes, method, start=None, **settings):
    "The weights of a short training."
    folder.mkdir()
    inputs = Inputs({'begun': start} if start else {}, {'train': TagFolder(scenes)})
    config = Config.from_flat(**TRAINING, **settings)
    train_cam(folder, inputs, config, find_method(method), start and 'begun')
    return read_weights(folder/'weights.safetensors')


@pytest.mark.parametrize('source', (*CHANCE_SOURCES, *INIT_PARTS))
def test_one_source_of_chance_at_a_time(scenes, tmp_path, source):
    "With another seed for one of them the training is another; with the run's seed it is the same."
    same, equal, other = (
        trained_weights(tmp_path/str(n), scenes, 'seam+ppc', dropout=.5, chance=chance)
        for n, chance in enumerate(({}, {source: 0}, {source: 1})))
    assert all(torch.equal(same[k], equal[k]) for k in same)
    assert not all(torch.equal(same[k], other[k]) for k in same)


@pytest.mark.parametrize('method, same', [('seam', True), ('seam+ppc', False)])
def test_a_method_may_begin_without_chance(scenes, tmp_path, method, same):
    "Then its maps are the same for every seed of `init`; the contrast's projector is random."
    settings = dict(pcm='fixed', classifier='zeros', epochs=1)
    torch.manual_seed(9)
    net = make_camnet(Config.from_flat(**TRAINING, **settings), 3, find_method(method))
    begun = {k: v for k, v in net.state_dict().items() if k.startswith('backbone.')}
    save_file(begun, tmp_path/'weights.safetensors')
    a, b = (trained_weights(tmp_path/f'{seed}', scenes, method, tmp_path, **settings,
                            chance={'init': seed}) for seed in (0, 1))
    assert torch.equal(a['classifier.weight'], b['classifier.weight']) == same
    assert not any(k.startswith('refine.') for k in a)


def test_a_fitted_classifier_is_at_the_minimum():
    "The gradient of the penalised class loss is zero, and the loss below that of no weights."
    torch.manual_seed(0)
    tags = torch.randint(2, (40, 3)).float()
    features = (tags@torch.rand(3, 16) + .3*torch.rand(40, 16))[:, None].repeat(1, 2, 1)
    weight = fit_classifier(features, tags).requires_grad_()
    scale, both = features.square().mean().sqrt(), tags.repeat_interleave(2, 0)
    loss = multilabel_soft_margin_loss(features.flatten(0, 1)@weight.T, both)
    gradient, = torch.autograd.grad(loss + DECAY*(weight*scale).square().sum(), weight)
    assert gradient.abs().max() < 1e-4
    assert loss < .9*multilabel_soft_margin_loss(torch.zeros_like(both), both)


def test_a_classifier_may_begin_fitted(scenes, tmp_path):
    "To the features of the backbone as it is, whatever the seed; the background's row is zero."
    settings = dict(pcm='fixed', classifier='fitted', epochs=1, lr=1e-9)
    torch.manual_seed(9)
    net = make_camnet(Config.from_flat(**TRAINING, **settings), 3, find_method('cam'))
    begun = {k: v for k, v in net.state_dict().items() if k.startswith('backbone.')}
    save_file(begun, tmp_path/'weights.safetensors')
    a, b = (trained_weights(tmp_path/f'{seed}', scenes, 'cam', tmp_path, **settings,
                            chance={'init': seed}) for seed in (0, 1))
    data = TagFolder(scenes)
    with torch.no_grad():
        last = [net.backbone.eval()(normalise(image)[None])[-1]
                for image in map(data.image, range(len(data)))]
    pooled = torch.stack([features.mean((0, 2, 3)) for features in last])
    expected = fit_classifier(torch.stack([pooled, pooled], 1), data.tags)
    found = a['classifier.weight'][1:, :, 0, 0]
    assert torch.allclose(found, b['classifier.weight'][1:, :, 0, 0], atol=1e-5)
    assert not a['classifier.weight'][0].abs().max() > 1e-5
    assert cosine_similarity(found, expected).min() > .9


def test_two_processes_do_not_share_a_run(scenes, tmp_path):
    with FileLock(tmp_path/'.lock'):
        arguments = f'{str(tmp_path)!r}, ["cam"], data={str(scenes)!r}'
        code = f'from ppc.pipeline import run; run({arguments})'
        found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.returncode and 'another process' in found.stderr


@pytest.mark.parametrize('wrong, words', [
    (dict(epoch=3), "did you mean 'epochs'"), (dict(colour='red'), "no parameter 'colour'"),
    (dict(epochs='3'), 'type int'), (dict(crf=1), 'type bool'), (dict(scales=1.0), 'type list'),
    (dict(scales=[]), r'scales is \[\], it should not be empty'), (dict(scales=[0]), 'above 0'),
    (dict(scales='1.5'), r"scales is \['1.5'\], it should be of type list, with numbers"),
    (dict(batch_size=0), 'batch_size is 0, it should be at least 1'),
    (dict(batch_size=-1), 'at least 1'), (dict(epochs=-3), 'epochs is -3, it should be at least 0'),
    (dict(k=-5), 'at least 0'), (dict(tau=-.1), 'tau is -0.1, it should be above 0'),
    (dict(lr=-1), 'above 0'), (dict(lr=float('nan')), 'above 0'), (dict(lr='fast'), 'type float'),
    (dict(threshold=25), 'threshold is 25, it should be at least 0 and below 1'),
    (dict(device='gpu'), "device is 'gpu': choose from auto, cpu"),
    (dict(precision='fp8'), 'no, bf16, fp16'), (dict(mask_split=''), 'mask_split .*not be empty'),
    (dict(crf_iterations=-1), 'at least 0'), (dict(seed=-1), 'seed is -1, it should be at least 0'),
    (dict(resize=[64, 48]), r'resize is \[64, 48\], .*smaller number first'),
    (dict(resize=['48', '64']), 'with 2 whole numbers'), (dict(resize=[64]), '2 whole numbers'),
    (dict(dropout=1.), 'below 1'), (dict(zoom=float('inf')), 'above 0'), (dict(rotate=720), '180'),
    (dict(epochs=True), 'type int'), (dict(chance={'init': -1}), 'a seed for each source'),
    (dict(chance={'init': '1'}), 'a seed for each source'), (dict(options=[]), 'type dict')])
def test_parameters_are_checked(wrong, words):
    with pytest.raises(ValueError, match=words):
        Config.from_flat(**wrong)


def test_values_as_they_are_meant():
    "What YAML or a command line makes of them; every default is within its range."
    assert Config.from_flat(lr='1e-4', precision=False).flat() == Config.from_flat(
        lr=1e-4, precision='no').flat()
    assert Config.from_flat(data='~/photos').run.data == str(Path('~/photos').expanduser())
    assert Config.from_flat(**Config().flat()) == Config()
    for presets in (PSA_PRESETS, IRN_PRESETS, RECIPES, READINGS):
        for name, made in presets.items():
            values = {f.name: getattr(made, f.name) for f in fields(made)}
            assert preset('preset', presets, name, values) == made


@pytest.mark.parametrize('text, words', [
    ('k: 1\ntau: .2\nk: 2', 'k stands there 2 times'), ('a: {b: 1, b: 1}', 'b stands there'),
    ('k: [3', 'not YAML .*line 1')])
def test_yaml_that_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)


def test_numbers_in_yaml():
    "As in YAML 1.2: 010 is ten."
    found = parse_yaml('[1e-4, 1E3, 010, -3, +3, .5, 1., 1:30, "1", no, 1e, -, 5.0e-4]')
    assert found == [1e-4, 1000., 10, -3, 3, .5, 1., '1:30', '1', False, '1e', '-', 5e-4]


def test_one_method_may_be_a_text(scenes, tmp_path):
    alone = dict(ALONE, data=str(scenes), batch_size=4, crop=64, target=32, resize=[64, 96])
    for n, methods in enumerate(('cam', METHODS['cam'])):
        assert {*run(tmp_path/str(n), methods, **alone)['seed_miou']} == {'cam'}
    missing, table = planning.dry_run('seam+ppc', 1, **alone)
    assert not missing and 'seam+ppc/train' in [*table.stage]


def test_parameters_of_an_earlier_edition():
    "They are read with a sentence that gives today's name, or, from records, without."
    old = {'lr_new': 5.0, 'classifier': 'drawn', 'options': {'negatives': 'drawn', 'grid': 8}}
    with pytest.warns(UserWarning) as told:
        config = Config.from_flat(**old)
    assert config.cam.head_lr_mult == 5 and config.cam.classifier == 'random'
    assert config.cam.options == {'negatives': 'random', 'grid': 8}
    said = [str(w.message) for w in told]
    assert len(said) == 3 and said[0] == 'lr_new: 5.0 is now head_lr_mult: 5.0.'
    assert modern(old) == modern(modern(old)) and Config.from_flat(**modern(old)) == config


@pytest.mark.parametrize('wrong, words', [
    (dict(methods=['sam']), "no method 'sam'"), (dict(methods=['ppc']), 'is an addition'),
    (dict(chance={'luck': 1}), 'init, order, views, noise'),
    (dict(backbone='resnet5000'), 'resnet5000'),
    (dict(backbone='resnet18', weights='nowhere.pt'), 'nowhere.pt is missing'),
    (dict(val_split='test'), 'test.txt'),
    (dict(pcm='frozen'), 'learned, fixed'), (dict(classifier='ones'), 'random, zeros'),
    (dict(backbone='vgg11', output_stride=8), 'output stride'),
    (dict(reading='mine'), 'paper, official'), (dict(options={'gird': 8}), 'grid'),
    (dict(optimizer='adam'), "no 'adam'"), (dict(seg_options={'optimizer': 'sgd'}), "no 'sgd'"),
    (dict(refine='sam'), 'none, crf, psa, irn'),
    (dict(refine='psa', preset='irn'), "preset is 'irn'"),
    (dict(refine='irn', refine_options={'beat': 8}), 'beta'),
    (dict(segmenter='unet'), "'unet'"), (dict(recipe='deeplab'), 'ssc'),
    (dict(seg_options={'learning_rate': 1}), 'lr'), (dict(seg_backbone='resnet5000'), 'resnet5000'),
    (dict(methods=[]), 'methods is'), (dict(methods=[3]), 'one or more'),
    (dict(options={'grid': -8}), 'options of reading: grid is -8, it should be at least 0'),
    (dict(options={'unit': 1}), 'options of reading: unit is 1, it should be of type bool'),
    (dict(seg_options={'lr': '1'}), 'options of recipe: lr is .1., it should be of type float'),
    (dict(seg_options={'scales': []}), 'options of recipe: scales .* not be empty'),
    (dict(seg_options={'jitter': [.1]}), 'with 4 numbers'),
    (dict(seg_options={'pairwise': 3}), 'options of recipe: pairwise is 3'),
    (dict(refine='psa', refine_options={'t': 2.5}), 'options of preset: t is 2.5'),
    (dict(refine='irn', refine_options={'scale': [2, 1]}), 'smaller number first'),
    (dict(segmenter='aspp-concat', seg_options={'batch_size': 1}), 'needs two in a batch'),
    (dict(refine='psa', refine_backbone='resnet18', refine_weights='nowhere.pt'),
     'nowhere.pt is missing')])
def test_wrong_runs_end_before_training(scenes, tmp_path, wrong, words, monkeypatch):
    monkeypatch.setattr(work, 'fit', None)
    with pytest.raises(ValueError, match=words):
        run(tmp_path/'run', **{'methods': ['cam'], 'data': str(scenes), **wrong})


@pytest.mark.parametrize('wrong, words', [
    (dict(scales=[0]), 'above 0'), (dict(methods=[]), 'one or more'),
    (dict(seg_options={'lr': -1}), 'options of recipe: lr'),
    (dict(segmenter='aspp-concat', seg_options={'batch_size': 1}), 'needs two in a batch')])
def test_a_plan_refuses_the_same(scenes, wrong, words, monkeypatch):
    monkeypatch.setattr(planning, '_probe', None)
    with pytest.raises(ValueError, match=words):
        planning.dry_run(**{'methods': ['cam'], 'data': str(scenes), **wrong})


@pytest.mark.parametrize('path', ['nothing', 'no-folder/git', 'refused'])
def test_no_git(path, tmp_path, monkeypatch):
    "Not on PATH, behind a file that is no folder, or there without the right to start it."
    (tmp_path/'no-folder').write_text('')
    (tmp_path/'refused').mkdir()
    (tmp_path/'refused'/'git').write_text('')
    monkeypatch.setenv('PATH', str(tmp_path/path))
    assert provenance()['commit'] is None


def test_a_mistake_can_be_mended_in_the_same_folder(scenes, tmp_path):
    "What was refused before it began leaves no configuration behind."
    with pytest.raises(ValueError):
        run(tmp_path/'run', ['cam'], data=str(scenes), **{**QUICK, 'val_split': 'vall'})
    found = run(tmp_path/'run', ['cam'], data=str(scenes), **ALONE, **QUICK)
    assert found['seed_miou']['cam'] is not None


def test_bad_image_ends_before_training(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(work, 'fit', None)
    (mine/'JPEGImages'/'val00003.jpg').write_bytes(b'')
    with pytest.raises(DataError, match='val00003.jpg'):
        run(tmp_path/'run', ['cam'], data=str(mine), **QUICK)


@pytest.mark.parametrize('share, warns', [(-1, True), (1, False)])
def test_masks_that_fill_their_images_are_warned_of(mine, tmp_path, monkeypatch, share, warns):
    "Large is what is larger than this share: every mask, or none."
    monkeypatch.setattr(work, 'LARGE', share)
    shutil.rmtree(mine/'SegmentationClass')
    settings = dict(QUICK, val_split='', segmenter='none')
    result = run(tmp_path/'run', ['cam'], data=str(mine), **settings)
    page = report_page(tmp_path/'run', tmp_path/'report.html').read_text()
    for text in (result.get('advice', ''), run_summary(tmp_path/'run', result), page):
        assert ('In 100 % of the tagged images the pseudo mask covers' in text) == warns


@pytest.mark.parametrize('refine', ['none', 'crf', 'psa', 'irn'])
def test_tags_only(mine, tmp_path, refine):
    "One's own photographs: no masks, no lists. Masks come out, numbers that need truth do not."
    for d in ('SegmentationClass', 'Saliency', 'Parts', 'ImageSets'):
        shutil.rmtree(mine/d)
    options = SMALL if refine in ('psa', 'irn') else {}
    settings = dict(QUICK, val_split='', refine=refine, refine_options=options)
    result = run(tmp_path/'run', ['cam'], data=str(mine), **settings)
    assert result['seed_miou'] == result['seed_crf_miou'] == {'cam': None}
    assert result['segmentation_miou'] is None and 0 < result['seed_threshold']['cam'] < 1
    assert len(list((tmp_path/'run'/'masks').glob('*.png'))) == 20
    assert all(row['miou'] is None and row['truth'] is None for row in result['table'])


def test_any_size_any_network(mine, tmp_path):
    "Several sizes, a timm network, weights from a file, a target the stride does not divide."
    for n, i in enumerate(TagFolder(mine).ids):
        for d, ending in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
            path = mine/d/f'{i}.{ending}'
            Image.open(path).resize((100 + n % 3, 90), Image.NEAREST).save(path)
    torch.save(timm.create_model('mobilenetv2_035').state_dict(), tmp_path/'w.pt')
    settings = {
        **QUICK, **ALONE, 'target': 47, 'crop': 81, 'options': {'grid': 5}, 'scales': [.5, 1.0],
        'backbone': 'mobilenetv2_035', 'weights': str(tmp_path/'w.pt'), 'output_stride': 16}
    result = run(tmp_path/'run', ['seam+ppc'], data=str(mine), **settings)
    assert result['seed_miou']['seam+ppc'] is not None


def test_photographs_on_their_side(mine, tmp_path):
    "Turned by EXIF, a stored 90x100 belongs to the images of 100x90, and the other way round."
    data, sizes = TagFolder(mine), [(100, 90), (90, 100)]
    for n, i in enumerate(data.ids):
        im = data.image(n).resize(sizes[n % 2])
        exif = im.getexif()
        exif[ExifTags.Base.Orientation] = (1, 6, 8, 1, 6, 3)[n % 6]
        im.save(data.files[i], exif=exif)
    groups = group_by_size(data, range(len(data)), 100)
    assert len(groups) == 2
    for g in groups:
        assert len({data.image(i).size for i in g}) == 1
    shutil.rmtree(mine/'SegmentationClass')
    run(tmp_path/'run', ['cam'], data=str(mine), val_split='', **QUICK)
    for n, i in enumerate(data.ids):
        assert read_mask(tmp_path/'run'/'masks'/f'{i}.png').shape == data.image(n).size[::-1]


# --- from seeds to masks ----------------------------------------------------------------------

SMALL = dict(batch_size=4, epochs=1, crop=64)
LATER = shutil.ignore_patterns('masks', 'segment*', 'shown', '.lock')


@pytest.fixture(scope='module')
def walked(done, scenes, tmp_path_factory):
    "Of the finished run, the CAMs; from there by PSA and by IRN."
    found = {}
    for refine, segmenter in (('psa', 'aspp'), ('irn', 'aspp-concat')):
        out = tmp_path_factory.mktemp('walked')/refine
        shutil.copytree(done[0], out, ignore=LATER)
        for f in ('config.json', 'metrics.json'):
            (out/f).unlink()
        more = dict(
            refine=refine, refine_options=SMALL, segmenter=segmenter, archive_split='val')
        found[refine] = out, more, run(out, TWO, data=str(scenes), **QUICK, **more)
    return found


@pytest.mark.parametrize('refine', ['psa', 'irn'])
def test_affinities_make_masks(walked, done, refine):
    out, more, result = walked[refine]
    assert result['seed_miou'] == done[1]['seed_miou']   # the same CAMs, not made again
    later = 'affinity-labels', 'affinity', 'masks', 'segmenter', 'shown', 'segmentation', 'archive'
    for stage in later:
        assert (out/stage/'metrics.json').is_file()
    labels, masks = ([read_mask(out/d/f'train{i:05}.png') for i in range(16)]
                     for d in ('affinity-labels', 'masks'))
    assert any((m == 255).any() for m in labels) and not any((m == 255).any() for m in masks)
    shown = json.loads((out/'shown'/'metrics.json').read_text())['images']
    assert {f.stem for f in (out/'shown').glob('*.png')} == {*shown}
    assert [rank.split(',')[0] for rank in shown.values()] == [*RANKS]
    assert (out/'archive'/'results.tgz').is_file()


@pytest.mark.parametrize('refine', ['psa', 'irn'])
@pytest.mark.parametrize('stage', ['affinity-labels', 'affinity', 'masks'])
def test_a_refinement_resumes(walked, scenes, tmp_path, refine, stage):
    "A stage that lost metrics and files comes back with the same bytes; those before it stay."
    source, more, result = walked[refine]
    shutil.copytree(source, tmp_path/'run')
    for s in ('.', stage):
        (tmp_path/'run'/s/'metrics.json').unlink()
    files = ['train00001.png', 'train00007.png']
    if stage == 'affinity':
        files = ['weights.safetensors']
    lost = [tmp_path/'run'/stage/f for f in files]
    for f in lost:
        f.unlink(missing_ok=True)
    again = run(tmp_path/'run', TWO, data=str(scenes), **QUICK, **more)
    for f in lost:
        assert f.read_bytes() == (source/stage/f.name).read_bytes()
    assert again['table'] == result['table']


def test_rows_say_what_they_are(walked, done):
    found = walked['psa'][2]
    rows = found['table']
    assert [(r['stage'], r['method']) for r in rows[:4]] == [
        ('seed', 'cam'), ('+CRF', 'cam'), ('seed', 'seam+ppc'), ('+CRF', 'seam+ppc')]
    assert [r['stage'] for r in rows[4:]] == ['PSA', 'segmenter']
    assert [r['tags at test time'] for r in rows] == [True]*5 + [False]
    assert rows[5]['list'] == 'val' and rows[0]['images'] == 16
    assert all(r['start'] == 'random, then tags' for r in rows)
    assert rows[0]['threshold from'] == 'best on train' and rows[0]['truth'] == 'SegmentationClass'
    assert rows[4]['miou'] == found['mask_miou'] and walked['irn'][2]['table'][4]['stage'] == 'IRN'


def test_other_networks_refine_and_segment(done, scenes, tmp_path):
    "A timm network for the affinities, another for the segmentation, weights from a file."
    torch.save(timm.create_model('mobilenetv2_035').state_dict(), tmp_path/'w.pt')
    shutil.copytree(done[0], tmp_path/'run', ignore=LATER)
    for f in ('config.json', 'metrics.json'):
        (tmp_path/'run'/f).unlink()
    more = dict(refine='psa', refine_options=SMALL, refine_backbone='mobilenetv2_035',
                refine_weights=str(tmp_path/'w.pt'), seg_backbone='resnet50')
    result = run(tmp_path/'run', TWO, data=str(scenes), **QUICK, **more)
    assert result['mask_miou'] is not None
    assert [r['start'] for r in result['table'][-2:]] == ['w.pt', 'random']


BASES = 'cam', 'seam', 'eps', 'eps+seam'


@pytest.mark.parametrize('method', [base + more for base in BASES for more in ('', '+ppc')])
def test_every_method_learns(method, scenes, tmp_path):
    "Each baseline with and without the contrast, on views that are turned, shifted and mirrored."
    settings = {**QUICK, **ALONE, 'warm_epochs': 0, 'dropout': .5, 'reading': 'paper',
                'flip': True, 'rotate': 20., 'translate': 16}
    result = run(tmp_path/'run', [method], data=str(scenes), **settings)
    log = read_log(tmp_path/'run'/method/'train'/'log.jsonl')
    of = {'seam': {'er', 'ecr', 'min'}, 'eps': {'sal'},
          'ppc': {'cross_prototype', 'cross_cam', 'intra'}}
    terms = {'cls'}.union(*(of[part] for part in of if part in method.split('+')))
    assert set(log[-1]) - {'step', 'lr', 'images_per_s'} == terms
    assert result['seed_miou'][method] > 0


# --- from outside the package --------------------------------------------------------------------

def entropy(batch, config):
    p = batch.source.cam.softmax(1)
    return {'entropy': -(p*p.log()).sum(1).mean()}


def count_masks(folder, inputs, config):
    "Copies the pseudo masks, and counts their pixels."
    for i in inputs.lists['train'].ids:
        shutil.copy(inputs['masks']/f'{i}.png', folder)
    return {'pixels': sum(read_mask(f).size for f in folder.glob('*.png'))}


def with_count(config, methods):
    count = Stage('count', count_masks, ('masks',), ('train',), title='counted', shows='mask')
    return [*stages(config, methods), count]


def test_a_method_and_a_stage_from_outside(scenes, tmp_path):
    "A record each: they are run, resumed, planned and reported, and nothing else knows of them."
    mine = METHODS['cam'] + Method('entropy', entropy, addition=True)
    settings = dict(QUICK, data=str(scenes), segmenter='none')
    out = tmp_path/'run'
    result = run(out, ['cam', mine], with_count, **settings)
    assert {*result['seed_miou']} == {'cam', 'cam+entropy'}
    assert 'entropy' in read_log(out/'cam+entropy'/'train'/'log.jsonl')[-1]
    assert read_json(out/'count'/'metrics.json')['pixels'] == 16*128*128
    assert run(out, ['cam', mine], with_count, **settings) == result
    missing, table = planning.dry_run(['cam', mine], 1, with_count, **settings)
    assert not missing and {'cam+entropy/train', 'count'} <= {*table.stage}
    shown, = find_runs(out)
    assert {'cam+entropy', 'counted'} <= {*gallery(shown).head}
    assert 'Losses of cam+entropy' in report_page(out, tmp_path/'r.html').read_text()


def test_a_backbone_from_outside(scenes, tmp_path, monkeypatch):
    "One record: it is trained, and asked for by name in the segmenter as well."
    record = Backbone('wide', lambda output_stride, weights: Tiny(32))
    monkeypatch.setitem(BACKBONES, 'wide', record)
    result = run(tmp_path/'run', ['seam+ppc'], data=str(scenes), backbone='wide', **QUICK)
    assert result['segmentation_miou'] is not None
    weights = read_weights(tmp_path/'run'/'segmenter'/'weights.safetensors')
    assert weights['backbone.conv3.0.0.weight'].shape[0] == 32


def test_every_parameter_is_read_by_a_stage_or_says_where_to_work():
    "So that a run with another value is never taken for this one."
    found = [s for refine in ('crf', 'psa') for s in stages(
        Config.from_flat(refine=refine, warm_epochs=1), ['eps+seam+ppc'])]
    resolved = {'preset', 'refine_options', 'recipe', 'seg_options'}  # in a stage's `options`
    lists = {'data', 'scenes', 'coats', 'zoom', 'saliency_quality', 'train_split', 'seed_split',
             'mask_split', 'val_split', 'archive_split', 'crf'}  # lists, and which stages there are
    where = {'shared', 'workers', 'device'}
    assert {r for s in found for r in s.reads} | resolved | lists | where == {*Config().flat()}


def test_eps_misses_a_saliency_map_before_training(mine, tmp_path):
    (mine/'Saliency'/'train00003.png').unlink()
    with pytest.raises(DataError, match='train00003.png is missing'):
        run(tmp_path/'run', ['eps'], data=str(mine), **QUICK)
    assert not (tmp_path/'run'/'eps').exists()


@pytest.mark.parametrize('name', ['resnet38', 'resnet50'])
def test_networks_of_the_paper_by_name(name):
    with torch.device('meta'):
        backbone = build_backbone(name, 8)
    width = {'resnet38': 4096, 'resnet50': 2048}[name]
    assert backbone.channels[-1] == width and backbone.stride == 8


@pytest.mark.parametrize('wrong, words', [
    (dict(epoch=3), "did you mean 'epochs'"),
    (dict(options={'gird': 8}), "options of reading are {'gird': 8}")])
def test_papermill_refuses_a_misspelt_parameter(wrong, words, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        papermill.execute_notebook(
            str(cli.run_notebook()), None, dict(wrong, out=str(tmp_path/'run')),
            progress_bar=False, kernel_name='python3')


# --- the command ------------------------------------------------------------------------------

def ppc(*args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_command_runs_and_writes_a_notebook(scenes, tmp_path):
    settings = dict(QUICK, data=str(scenes), out=str(tmp_path/'run'), methods=['cam'])
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(settings))
    less = '-p', 'segmenter=none', '-p', 'refine=none', '-p', 'crf=false'
    done = ppc('run', tmp_path/'p.yaml', *less)
    assert done.exit_code == 0, done.output
    assert 'cam' in done.output and (tmp_path/'run'/'result.png').is_file()
    book = json.loads((tmp_path/'run'/'run.ipynb').read_text())
    outputs = [o for c in book['cells'] for o in c.get('outputs', [])]
    assert not any(o.get('output_type') == 'error' for o in outputs)


@pytest.mark.parametrize('text, words', [
    ('epoch: 3\nout: x', "did you mean 'epochs'"), ('data: x', 'out'), ('- a', 'name: value'),
    ('a: [', 'YAML')])
def test_command_tells_what_is_wrong(tmp_path, text, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'p.yaml').write_text(text)
    done = ppc('run', tmp_path/'p.yaml')
    assert done.exit_code == 1 and words in done.output and 'Traceback' not in done.output


def test_scenes_are_repeatable(tmp_path):
    assert ppc('scenes', tmp_path/'a', '--train', 3, '--val', 1).exit_code == 0
    assert ppc('scenes', tmp_path/'b', '--train', 3, '--val', 1).exit_code == 0
    for f in sorted((tmp_path/'a').rglob('*.*')):
        if f.is_file():
            assert f.read_bytes() == (tmp_path/'b'/f.relative_to(tmp_path/'a')).read_bytes()
    assert ppc('scenes', tmp_path/'a', '--train', 3, '--val', 1).exit_code == 0
    other = ppc('scenes', tmp_path/'a', '--train', 4)
    assert other.exit_code == 1 and 'choose another folder' in other.output


def test_command_exports_the_network(walked, scenes, tmp_path):
    "What leaves gives the masks that the run gave."
    onnxruntime = pytest.importorskip('onnxruntime')
    out = walked['psa'][0]
    done = ppc('export', out, tmp_path/'net.onnx')
    assert done.exit_code == 0, done.output
    session = onnxruntime.InferenceSession(tmp_path/'net.onnx')
    data = TagFolder(scenes, 'val')
    def logits(image): return session.run(['logits'], {'image': np.ascontiguousarray(image)})[0]
    for n, i in enumerate(data.ids):
        image = np.asarray(data.image(n)).transpose(2, 0, 1)[None]
        mean = (logits(image) + logits(image[..., ::-1])[..., ::-1])/2
        assert (mean[0].argmax(0) == read_mask(out/'segmentation'/f'{i}.png')).mean() > .999
    for wrong, words in ((tmp_path, 'no trained segmenter'), (out, 'should end in')):
        failed = ppc('export', wrong, tmp_path/'net.pth')
        assert failed.exit_code == 1 and words in failed.output
