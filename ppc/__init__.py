"""Pixel masks from image tags: weakly supervised semantic segmentation.

The package reproduces "Weakly Supervised Semantic Segmentation by Pixel-to-Prototype Contrast"
(CVPR 2022) on both of the paper's baselines, SEAM and EPS, through CRF, PSA, IRN and DeepLab.
Each module is a chapter of the book in nbs/, where its functions are derived and tested.

The loss, for a codebase of one's own::

    from ppc import PixelToPrototypeContrast, View

    contrast = PixelToPrototypeContrast(k=32)
    loss = contrast(View(cam, embedding), View(cam2, embedding2), tags).total

A whole run, from a folder of tagged photographs to masks, and its network on new photographs::

    import ppc

    ppc.run('runs/mine', ['seam+ppc'], data='datasets/mine', backbone='resnet50', weights='hub')
    ppc.predict('runs/mine', ['photos/'], 'out')

On the command line: ``ppc demo``, ``ppc run``, ``ppc predict``; ``ppc --help`` lists all commands.
Names below are imported when they are first used.
"""

from importlib import import_module

__version__ = '0.3.0'

_MODULES = {
    'cam': ['CamNet', 'Maps', 'class_loss', 'confidences', 'normalise_maps', 'pseudo_labels'],
    'views': ['Transformation', 'View', 'paired_views', 'random_transformation', 'resize'],
    'prototypes': ['Prototypes', 'prototypes'],
    'contrast': ['ContrastLosses', 'PixelToPrototypeContrast', 'Reading', 'prototype_contrast'],
    'backbones': ['Backbone', 'ResNet', 'ResNet38', 'Timm', 'build_backbone'],
    'methods': ['Batch', 'Method', 'find_method'],
    'crf': ['Pairwise', 'crf_scores', 'dense_crf'],
    'walk': ['random_walk'],
    'metrics': ['ThresholdCurve', 'confusion', 'iou', 'miou'],
    'data': ['DataError', 'TagFolder'],
    'parameters': ['Config'],
    'stages': ['Stage', 'stages'],
    'pipeline': ['run'],
    'predicting': ['load_model', 'predict'],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'.{_HOME[name]}', __name__), name)
    return value


def __dir__():
    return [*globals(), *__all__]
