"From a folder of tagged images to masks; and what happens when something is wrong, missing, damaged or interrupted."
import json
import shutil
import subprocess
import sys
from dataclasses import replace
import numpy as np
import papermill
import pytest
import torch
import yaml
from filelock import FileLock
from safetensors.torch import save_file
from typer.testing import CliRunner
from ppc import cli, pipeline, stages
from ppc.data import DataError, TagFolder, read_mask
from ppc.inference import group_by_size, read_cam
from ppc.parameters import CamTraining, Shared, settings
from ppc.pipeline import run
from ppc.stages import read_json
from ppc.training import read_log
from ppc.weights import read_weights

QUICK = dict(batch_size=4, warm_epochs=1, crop=64, target=32, resize=[64, 96], k=4, seg_options=dict(batch_size=4, epochs=1, crop=64))


@pytest.fixture(scope='module')
def done(scenes, tmp_path_factory):
    "A finished run of two methods."
    out = tmp_path_factory.mktemp('runs')/'done'
    return out, run(out, ['cam', 'seam+ppc'], data=str(scenes), **QUICK)


def test_every_stage_reports(done, scenes):
    out, result = done
    assert set(result['seed_miou']) == {'cam', 'seam+ppc'} and result['segmentation_miou'] is not None
    for stage in ['warm', 'cam/train', 'cam/cams-train', 'cam/seeds', 'cam/crf', 'seam+ppc/train', 'masks', 'segmenter', 'segmentation', '.']:
        assert (out/stage/'metrics.json').is_file() and (out/stage/'config.json').is_file()
    assert result == read_json(out/'metrics.json') and result['parameters']['k'] == 4 and result['versions']['torch']
    for i in TagFolder(scenes).ids:
        assert read_mask(out/'masks'/f'{i}.png').shape == (128, 128)
    assert len(list((out/'segmentation').glob('*.png'))) == 4


def test_again_does_nothing(done, scenes, monkeypatch):
    out, result = done
    monkeypatch.setattr(stages, 'fit', None)
    assert run(out, ['cam', 'seam+ppc'], data=str(scenes), **QUICK) == result


def test_lost_stage_is_done_again(done, scenes, tmp_path):
    "Without its metrics.json a stage is not done, whatever else it left."
    shutil.copytree(done[0], tmp_path/'run')
    for stage in ('.', 'masks'):
        (tmp_path/'run'/stage/'metrics.json').unlink()
    lost = tmp_path/'run'/'masks'/'train00000.png'
    lost.unlink()
    again = run(tmp_path/'run', ['cam', 'seam+ppc'], data=str(scenes), **QUICK)
    assert lost.is_file() and again['seed_miou'] == done[1]['seed_miou'] and again['mask_miou'] == done[1]['mask_miou']


def test_same_seed_same_numbers(done, scenes, tmp_path):
    again = run(tmp_path/'again', ['cam', 'seam+ppc'], data=str(scenes), **QUICK)
    for k in ('seed_miou', 'seed_crf_miou', 'mask_miou', 'segmentation_miou'):
        assert again[k] == done[1][k]


@pytest.mark.parametrize('change', [dict(k=8), dict(scales=[1.0, 1.5]), dict(seed=1)])
def test_other_parameters_are_refused(done, scenes, change):
    name, = change
    with pytest.raises(ValueError, match=f'{name} = '):
        run(done[0], ['cam', 'seam+ppc'], data=str(scenes), **{**QUICK, **change})


@pytest.mark.parametrize('stage, name', [('cam/cams-train', 'train00001.npz'), ('masks', 'train00001.png')])
def test_damaged_file_is_named(done, scenes, tmp_path, stage, name):
    shutil.copytree(done[0], tmp_path/'run')
    path = tmp_path/'run'/stage/name
    path.write_bytes(path.read_bytes()[:100])
    for s in ('.', 'cam/seeds', 'seam+ppc/seeds', 'segmenter'):
        (tmp_path/'run'/s/'metrics.json').unlink()
    shutil.rmtree(tmp_path/'run'/'segmenter')
    with pytest.raises(DataError, match=name):
        run(tmp_path/'run', ['cam', 'seam+ppc'], data=str(scenes), **QUICK)


def test_cam_files_unpickle_nothing(tmp_path):
    np.savez(tmp_path/'a.npz', cam=np.array([{}], dtype=object), present=np.array([1]))
    with pytest.raises(DataError, match='damaged'):
        read_cam(tmp_path/'a.npz')


def test_damaged_metrics_are_named(done, scenes, tmp_path):
    shutil.copytree(done[0], tmp_path/'run')
    (tmp_path/'run'/'metrics.json').write_text('{"seed')
    with pytest.raises(DataError, match='metrics.json is damaged'):
        run(tmp_path/'run', ['cam', 'seam+ppc'], data=str(scenes), **QUICK)


SHARED = dict(batch_size=4, crop=64, target=32, resize=[64, 96], scenes=12, closeups=32, warm_epochs=1, segmenter='none', refine='none', crf=False)


def test_runs_share_what_they_have_in_common(tmp_path, monkeypatch):
    "Scenes, starts and the baseline are made once; what differs is not mixed up; the numbers are those of a run alone."
    trained = []
    fit = stages.fit
    monkeypatch.setattr(stages, 'fit', lambda *a, **k: trained.append(k['label']) or fit(*a, **k))
    alone = run(tmp_path/'alone', ['seam', 'seam+ppc'], **SHARED, k=4)
    assert trained == ['pretrain', 'cam', 'seam', 'seam+ppc']
    shared = str(tmp_path/'shared')
    found = run(tmp_path/'a', ['seam', 'seam+ppc'], **SHARED, k=4, shared=shared)
    assert found['seed_miou'] == alone['seed_miou'] and trained[4:] == trained[:4]
    assert run(tmp_path/'b', ['seam', 'seam+ppc'], **SHARED, k=8, shared=shared)['seed_miou']['seam'] == alone['seed_miou']['seam'] and trained[8:] == ['seam+ppc']
    assert run(tmp_path/'c', ['seam+ppc'], **SHARED, k=4, shared=shared)['seed_miou']['seam+ppc'] == alone['seed_miou']['seam+ppc'] and len(trained) == 9
    run(tmp_path/'d', ['seam'], **SHARED, seed=1, shared=shared)
    assert trained[9:] == ['pretrain', 'cam', 'seam'] and TagFolder(tmp_path/'d'/'scenes').ids


def test_two_runs_at_once_train_the_baseline_once(tmp_path):
    code = 'import sys; from ppc.pipeline import run; run(sys.argv[1], ["seam"], shared=sys.argv[2], **eval(sys.argv[3]))'
    both = [subprocess.Popen([sys.executable, '-c', code, tmp_path/n, tmp_path/'shared', repr({**SHARED, 'warm_epochs': 0, 'alpha': a})], stderr=subprocess.PIPE, text=True)
            for n, a in (('a', .1), ('b', .2))]   # a weight of the contrast, which the baseline does not have
    for p in both:
        assert p.communicate()[1] is not None and p.returncode == 0
    assert len([*(tmp_path/'shared').glob('seam-*/')]) == 1 and (tmp_path/'a'/'seam').resolve() == (tmp_path/'b'/'seam').resolve()
    assert read_json(tmp_path/'a'/'metrics.json')['seed_miou'] == read_json(tmp_path/'b'/'metrics.json')['seed_miou']


@pytest.mark.parametrize('source', (*stages.CHANCE, *stages.PARTS))
def test_one_source_of_chance_at_a_time(scenes, tmp_path, source):
    "With another seed for one of them the training is another; with the run's own seed it is the same."
    p = settings(batch_size=4, crop=64, target=32, k=4, dropout=.5)
    weights = []
    for n, chance in enumerate(({}, {source: 0}, {source: 1})):
        (tmp_path/str(n)).mkdir()
        stages.train_cam(tmp_path/str(n), TagFolder(scenes), 'seam+ppc', p[Shared], replace(p[CamTraining], chance=chance), None)
        weights.append(read_weights(tmp_path/str(n)/'weights.safetensors'))
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert not all(torch.equal(weights[0][k], weights[2][k]) for k in weights[0])


def test_a_method_may_begin_without_chance(scenes, tmp_path):
    "Then its maps are the same whatever seed `init` has; the projector of the contrast is still drawn."
    p = settings(batch_size=4, crop=64, target=32, k=4, pcm='fixed', classifier='zeros', epochs=1)
    for method, same in (('seam', True), ('seam+ppc', False)):
        weights = []
        for seed in (0, 1):
            folder = tmp_path/f'{method}-{seed}'
            folder.mkdir()
            torch.manual_seed(9)
            begun = {k: v for k, v in stages.make_camnet(p[CamTraining], 3, method).state_dict().items() if k.startswith('backbone.')}
            save_file(begun, tmp_path/'begun.safetensors')
            stages.train_cam(folder, TagFolder(scenes), method, p[Shared], replace(p[CamTraining], chance={'init': seed}), tmp_path/'begun.safetensors')
            weights.append(read_weights(folder/'weights.safetensors'))
        assert torch.equal(*[w['classifier.weight'] for w in weights]) == same and not any(k.startswith('refine.') for k in weights[0])


def test_two_processes_do_not_share_a_run(scenes, tmp_path):
    with FileLock(tmp_path/'.lock'):
        code = f'from ppc.pipeline import run; run({str(tmp_path)!r}, ["cam"], data={str(scenes)!r})'
        found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.returncode and 'another process' in found.stderr


@pytest.mark.parametrize('wrong, words', [
    (dict(epoch=3), "did you mean 'epochs'"), (dict(colour='red'), "no parameter 'colour'"), (dict(epochs='3'), 'type int'),
    (dict(crf=1), 'type bool'), (dict(scales=1.0), 'type list')])
def test_parameters_are_checked(wrong, words):
    with pytest.raises(ValueError, match=words):
        settings(**wrong)


@pytest.mark.parametrize('wrong, words', [
    (dict(methods=['sam']), "no method 'sam'"), (dict(chance={'luck': 1}), 'init, order, views, noise'), (dict(backbone='resnet5000'), 'resnet5000'),
    (dict(backbone='resnet18', weights='nowhere.pt'), 'nowhere.pt is missing'), (dict(val_split='test'), 'test.txt'),
    (dict(pcm='frozen'), 'learned, fixed'), (dict(classifier='ones'), 'drawn, zeros'),
    (dict(backbone='vgg11', output_stride=8), 'output stride'), (dict(reading='mine'), 'paper, official'), (dict(options={'gird': 8}), 'grid'),
    (dict(optimizer='adam'), "no 'adam'"), (dict(seg_options={'optimizer': 'sgd'}), "no 'sgd'"),
    (dict(refine='sam'), 'none, crf, psa, irn'), (dict(refine='psa', preset='irn'), "preset is 'irn'"), (dict(refine='irn', refine_options={'beat': 8}), 'beta'),
    (dict(segmenter='unet'), "'unet'"), (dict(recipe='deeplab'), 'ssc'), (dict(seg_options={'learning_rate': 1}), 'lr'),
    (dict(seg_backbone='resnet5000'), 'resnet5000'), (dict(refine='psa', refine_backbone='resnet18', refine_weights='nowhere.pt'), 'nowhere.pt is missing')])
def test_wrong_runs_end_before_training(scenes, tmp_path, wrong, words, monkeypatch):
    monkeypatch.setattr(stages, 'fit', None)
    with pytest.raises(ValueError, match=words):
        run(tmp_path/'run', **{'methods': ['cam'], 'data': str(scenes), **wrong})


def test_a_mistake_can_be_mended_in_the_same_folder(scenes, tmp_path):
    "What was refused before it began leaves no configuration behind."
    with pytest.raises(ValueError):
        run(tmp_path/'run', ['cam'], data=str(scenes), **{**QUICK, 'val_split': 'vall'})
    assert run(tmp_path/'run', ['cam'], data=str(scenes), segmenter='none', refine='none', crf=False, **QUICK)['seed_miou']['cam'] is not None


def test_bad_image_ends_before_training(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, 'fit', None)
    (mine/'JPEGImages'/'val00003.jpg').write_bytes(b'')
    with pytest.raises(DataError, match='val00003.jpg'):
        run(tmp_path/'run', ['cam'], data=str(mine), **QUICK)


@pytest.mark.parametrize('refine', ['none', 'crf', 'psa', 'irn'])
def test_tags_only(mine, tmp_path, refine):
    "One's own photographs: no masks, no lists. Masks come out, numbers that need truth do not."
    for d in ('SegmentationClass', 'Saliency', 'Parts', 'ImageSets'):
        shutil.rmtree(mine/d)
    result = run(tmp_path/'run', ['cam'], data=str(mine), val_split='', refine=refine, refine_options=SMALL if refine in ('psa', 'irn') else {}, **QUICK)
    assert result['seed_miou'] == {'cam': None} and result['seed_crf_miou'] == {'cam': None} and result['segmentation_miou'] is None
    assert result['seed_threshold'] == {'cam': .25} and len(list((tmp_path/'run'/'masks').glob('*.png'))) == 20
    assert all(row['miou'] is None and row['truth'] is None for row in result['table'])


def test_any_size_any_network(mine, tmp_path):
    "Images of several sizes, a timm network at output stride 16 with weights from a file, a target that is no multiple of the stride."
    import timm
    import torch
    from PIL import Image
    for n, i in enumerate(TagFolder(mine).ids):
        for d, ending in (('JPEGImages', 'jpg'), ('SegmentationClass', 'png')):
            path = mine/d/f'{i}.{ending}'
            Image.open(path).resize((100 + n % 3, 90), Image.NEAREST).save(path)
    torch.save(timm.create_model('mobilenetv2_035').state_dict(), tmp_path/'w.pt')
    result = run(tmp_path/'run', ['seam+ppc'], data=str(mine), **{**QUICK, 'target': 47, 'crop': 81}, options={'grid': 5}, backbone='mobilenetv2_035',
                 weights=str(tmp_path/'w.pt'), output_stride=16, segmenter='none', refine='none', scales=[.5, 1.0])
    assert result['seed_miou']['seam+ppc'] is not None


def test_photographs_on_their_side(mine, tmp_path):
    "Turned by EXIF, a stored 90x100 belongs to the images of 100x90, and the other way round."
    from PIL import ExifTags, Image
    data, sizes = TagFolder(mine), [(100, 90), (90, 100)]
    for n, i in enumerate(data.ids):
        im = data.image(n).resize(sizes[n % 2])
        exif = im.getexif()
        exif[ExifTags.Base.Orientation] = (1, 6, 8, 1, 6, 3)[n % 6]
        im.save(data.files[i], exif=exif)
    groups = group_by_size(data, range(len(data)), 100)
    assert len(groups) == 2 and all(len({data.image(i).size for i in g}) == 1 for g in groups)
    shutil.rmtree(mine/'SegmentationClass')
    run(tmp_path/'run', ['cam'], data=str(mine), val_split='', **QUICK)
    for n, i in enumerate(data.ids):
        assert read_mask(tmp_path/'run'/'masks'/f'{i}.png').shape == data.image(n).size[::-1]


# --- from seeds to masks -----------------------------------------------------------------------------------------------------

SMALL = dict(batch_size=4, epochs=1, crop=64)


@pytest.fixture(scope='module')
def walked(done, scenes, tmp_path_factory):
    "Of the finished run, the CAMs; from there by PSA and by IRN."
    found = {}
    for refine, segmenter in (('psa', 'aspp'), ('irn', 'aspp-concat')):
        out = tmp_path_factory.mktemp('walked')/refine
        shutil.copytree(done[0], out, ignore=shutil.ignore_patterns('masks', 'segment*', 'shown', '.lock'))
        for f in ('config.json', 'metrics.json'):
            (out/f).unlink()
        more = dict(refine=refine, refine_options=SMALL, segmenter=segmenter, archive_split='val')
        found[refine] = out, more, run(out, ['cam', 'seam+ppc'], data=str(scenes), **QUICK, **more)
    return found


@pytest.mark.parametrize('refine', ['psa', 'irn'])
def test_affinities_make_masks(walked, done, refine):
    out, more, result = walked[refine]
    assert result['seed_miou'] == done[1]['seed_miou']   # the same CAMs, not made again
    for stage in ('affinity-labels', 'affinity', 'masks', 'segmenter', 'shown', 'segmentation', 'archive'):
        assert (out/stage/'metrics.json').is_file()
    labels, masks = ([read_mask(out/d/f'train{i:05}.png') for i in range(16)] for d in ('affinity-labels', 'masks'))
    assert any((m == 255).any() for m in labels) and not any((m == 255).any() for m in masks)
    assert len(list((out/'shown').glob('*.png'))) == 6 and (out/'archive'/'results.tgz').is_file()


@pytest.mark.parametrize('refine', ['psa', 'irn'])
@pytest.mark.parametrize('stage', ['affinity-labels', 'affinity', 'masks'])
def test_a_refinement_resumes(walked, scenes, tmp_path, refine, stage):
    "A stage that lost its metrics and some of its files comes back with the same bytes, and nothing before it is done again."
    source, more, result = walked[refine]
    shutil.copytree(source, tmp_path/'run')
    for s in ('.', stage):
        (tmp_path/'run'/s/'metrics.json').unlink()
    lost = [tmp_path/'run'/stage/('weights.safetensors' if stage == 'affinity' else f'train{i:05}.png') for i in (1, 7)]
    for f in lost:
        f.unlink(missing_ok=True)
    again = run(tmp_path/'run', ['cam', 'seam+ppc'], data=str(scenes), **QUICK, **more)
    for f in lost:
        assert f.read_bytes() == (source/stage/f.name).read_bytes()
    assert again['table'] == result['table']


def test_rows_say_what_they_are(walked, done):
    rows = walked['psa'][2]['table']
    assert [(r['stage'], r['method']) for r in rows[:4]] == [('seed', 'cam'), ('+CRF', 'cam'), ('seed', 'seam+ppc'), ('+CRF', 'seam+ppc')]
    assert rows[4]['stage'] == 'PSA' and rows[5]['stage'] == 'segmenter' and len(rows) == 6
    assert all(r['tags at test time'] for r in rows[:5]) and not rows[5]['tags at test time'] and rows[5]['list'] == 'val' and rows[0]['images'] == 16
    assert all(r['start'] == 'random, then tags' for r in rows) and rows[0]['threshold from'] == 'best on train' and rows[0]['truth'] == 'SegmentationClass'
    assert rows[4]['miou'] == walked['psa'][2]['mask_miou'] and walked['irn'][2]['table'][4]['stage'] == 'IRN'


def test_other_networks_refine_and_segment(done, scenes, tmp_path):
    "A timm network for the affinities, another for the segmentation, weights from a file."
    import timm
    torch.save(timm.create_model('mobilenetv2_035').state_dict(), tmp_path/'w.pt')
    shutil.copytree(done[0], tmp_path/'run', ignore=shutil.ignore_patterns('masks', 'segment*', 'shown', '.lock'))
    for f in ('config.json', 'metrics.json'):
        (tmp_path/'run'/f).unlink()
    result = run(tmp_path/'run', ['cam', 'seam+ppc'], data=str(scenes), **QUICK, refine='psa', refine_options=SMALL, refine_backbone='mobilenetv2_035',
                 refine_weights=str(tmp_path/'w.pt'), seg_backbone='resnet50')
    assert result['mask_miou'] is not None and [r['start'] for r in result['table'][-2:]] == ['w.pt', 'random']


@pytest.mark.parametrize('method', stages.KNOWN)
def test_every_method_learns(method, scenes, tmp_path):
    "Each baseline with and without the contrast, on views that are turned, shifted and mirrored."
    result = run(tmp_path/'run', [method], data=str(scenes), **{**QUICK, 'warm_epochs': 0}, flip=True, rotate=20., translate=16, dropout=.5,
                 reading='paper', segmenter='none', refine='none', crf=False)
    log = read_log(tmp_path/'run'/method/'train'/'log.jsonl')
    terms = {'cls'} | ({'er', 'ecr', 'min'} if 'seam' in method else set()) | ({'sal'} if 'eps' in method else set())
    assert set(log[-1]) - {'step', 'lr', 'images_per_s'} == terms | ({'cross_prototype', 'cross_cam', 'intra'} if 'ppc' in method else set())
    assert result['seed_miou'][method] > 0


def test_eps_misses_a_saliency_map_before_training(mine, tmp_path):
    (mine/'Saliency'/'train00003.png').unlink()
    with pytest.raises(DataError, match='train00003.png is missing'):
        run(tmp_path/'run', ['eps'], data=str(mine), **QUICK)
    assert not (tmp_path/'run'/'eps').exists()


@pytest.mark.parametrize('name', ['resnet38', 'resnet50'])
def test_networks_of_the_paper_by_name(name):
    with torch.device('meta'):
        backbone = stages.make_backbone(CamTraining(backbone=name))
    assert backbone.channels[-1] == {'resnet38': 4096, 'resnet50': 2048}[name] and backbone.stride == 8


@pytest.mark.parametrize('wrong, words', [(dict(epoch=3), "did you mean 'epochs'"), (dict(options={'gird': 8}), "options of reading are {'gird': 8}")])
def test_papermill_refuses_a_misspelt_parameter(wrong, words, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        papermill.execute_notebook(str(cli.notebook()), None, dict(wrong, out=str(tmp_path/'run')), progress_bar=False, kernel_name='python3')


# --- the command -----------------------------------------------------------------------------------------------------------

def ppc(*args): return CliRunner().invoke(cli.app, [str(a) for a in args])


def test_command_runs_and_writes_a_notebook(scenes, tmp_path):
    (tmp_path/'p.yaml').write_text(yaml.safe_dump(dict(QUICK, data=str(scenes), out=str(tmp_path/'run'), methods=['cam'])))
    done = ppc('run', tmp_path/'p.yaml', '-p', 'segmenter=none', '-p', 'refine=none', '-p', 'crf=false')
    assert done.exit_code == 0, done.output
    assert 'cam' in done.output and (tmp_path/'run'/'result.png').is_file()
    book = json.loads((tmp_path/'run'/'run.ipynb').read_text())
    assert not any(o.get('output_type') == 'error' for c in book['cells'] for o in c.get('outputs', []))


@pytest.mark.parametrize('text, words', [('epoch: 3\nout: x', "did you mean 'epochs'"), ('data: x', 'out'), ('- a', 'name: value'), ('a: [', 'YAML')])
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
    session, data = onnxruntime.InferenceSession(tmp_path/'net.onnx'), TagFolder(scenes, 'val')
    for n, i in enumerate(data.ids):
        image = np.asarray(data.image(n)).transpose(2, 0, 1)[None]
        plain, mirrored = (session.run(['logits'], {'image': np.ascontiguousarray(x)})[0] for x in (image, image[..., ::-1]))
        mean = (plain + mirrored[..., ::-1])/2
        assert (mean[0].argmax(0) == read_mask(out/'segmentation'/f'{i}.png')).mean() > .999
    for wrong, words in ((tmp_path, 'no trained segmenter'), (out, 'should end in')):
        failed = ppc('export', wrong, tmp_path/'net.pth')
        assert failed.exit_code == 1 and words in failed.output
