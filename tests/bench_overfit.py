"""Sixteen real images learned by heart: can the whole path, from annotation file to COCO AP, represent the truth?

    make bench-overfit        or: python tests/bench_overfit.py [folder of COCO data]
"""
import argparse, json, shutil, tempfile, time
from pathlib import Path
from fastai.torch_core import set_seed
from posenb.augment import test_size
from posenb.callbacks import FreezeBN
from posenb.evaluate import ap_table
from posenb.learner import muon, pose_dls, pose_learner
from posenb.loss import PoseLoss
from posenb.samplers import set_order
from posenb.train import training_callbacks

def first_images(data, folder, n):
    "A COCO folder in which the first `n` images with people of `data` are both to learn and to be tested on"
    coco = json.loads((data/'annotations'/'person_keypoints_train2017.json').read_text())
    with_people = {a['image_id'] for a in coco['annotations'] if a['num_keypoints'] and not a['iscrowd']}
    images = [i for i in coco['images'] if i['id'] in with_people][:n]
    kept = {i['id'] for i in images}
    coco.update(images=images, annotations=[a for a in coco['annotations'] if a['image_id'] in kept])
    (folder/'annotations').mkdir()
    for split in ('train2017', 'val2017'):
        (folder/split).mkdir()
        (folder/'annotations'/f'person_keypoints_{split}.json').write_text(json.dumps(coco))
        for i in images: shutil.copy(data/'train2017'/i['file_name'], folder/split)
    return folder

def loaders(data, size, bs):
    "Inputs as in the test, now and then mirrored, those of one shape together; epochs of 50 batches"
    dls = pose_dls(data, size=size, bs=bs, workers=1, convention='unbiased', square=False, scale_range=(1, 1), max_rotation=0, max_translate=0)
    shapes = [test_size(i['width'], i['height'], size) for i in map(dls.train.dataset.info, range(len(dls.train.dataset)))]
    set_order(dls.train, n_iter=50, groups=[sorted(set(shapes)).index(shape) for shape in shapes])     # sixteen images are few batches: an epoch has them many times
    return dls

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('data', nargs='?', type=Path, default=Path(__file__).parents[2]/'shared'/'coco_tiny', help='folder of COCO data')
    parser.add_argument('--images', type=int, default=16)
    parser.add_argument('--size', type=int, default=256, help='short side of the input; the training begins with half of it')
    parser.add_argument('--lr', type=float, default=2e-2)
    parser.add_argument('--epochs', type=int, default=45, help='of 50 batches, after 10 at half the size')
    parser.add_argument('--bar', type=float, default=.8, help='AP to be reached')
    args = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = first_images(args.data, Path(folder), args.images)
        small,large = loaders(data, args.size//2, 12),loaders(data, args.size, 6)
        loss = PoseLoss(large.skeleton.n, push_weight=3e-2, pull_weight=3e-2, foreground=10)
        learn = pose_learner(small, 'tiny', loss_func=loss, opt_func=muon, path=folder, ap_every=20, cbs=training_callbacks(), predictor_args=dict(detection_threshold=.5))
        start = time.perf_counter()
        learn.fit_schedule(10, args.lr, sched='flat', warmup=1, wd=0)     # what a joint looks like is learned in small images
        learn.dls = large                                                 # and where it is in large ones
        learn.fit_schedule(args.epochs//3, args.lr, sched='flat', warmup=1, wd=0)
        learn.fit_schedule(args.epochs - args.epochs//3, args.lr, sched='cosine', wd=0, cbs=FreezeBN())     # with the statistics of all images, as in the test
        minutes = (time.perf_counter() - start)/60
        stats = learn.evaluate()
    print(ap_table(stats), f'{args.images} images, {args.epochs} epochs, {minutes:.1f} minutes', sep='\n\n')
    if stats['AP'] < args.bar: raise SystemExit(f"AP {stats['AP']:.3f} is below {args.bar}")

if __name__ == '__main__': main()
