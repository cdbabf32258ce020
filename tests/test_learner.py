"The learner: other skeletons and datasets, what its pictures show, when AP is taken, and processes without a share"
import json, os, shutil, subprocess, sys
import cv2, numpy as np, pytest, torch
from fastai.torch_core import default_device
from posenb.callbacks import EMA, Precision
from posenb.learner import AP, pose_dls, pose_learner
from posenb.synthetic import synth_people

torch.set_num_threads(1)

def small(path, **kwargs): return pose_dls(path, **{**dict(size=64, bs=4, workers=0), **kwargs})

def test_crowdpose_is_evaluated_by_its_own_rule(crowdpose):
    learn = pose_learner(small(crowdpose, bs=2, train='trainval', valid='test'), 'tiny')
    assert {'AP', 'AP easy', 'AP medium', 'AP hard'} <= learn.evaluate().keys()

def with_mice(path, to):
    "The drawn people once more, and as many mice with as many joints"
    shutil.copytree(path, to)
    for file in (to/'annotations').glob('*.json'):
        data = json.loads(file.read_text())
        data['categories'].append(dict(data['categories'][0], id=2, name='mouse'))
        data['annotations'] += [dict(a, category_id=2, id=a['id'] + 10**6) for a in data['annotations'][:4]]
        file.write_text(json.dumps(data))
    return to

def test_a_category_of_ones_own(synth, tmp_path):
    dls = small(with_mice(synth, tmp_path/'mice'), category='mouse')
    assert dls.test.category['id'] == dls.valid_ds.category['id'] == 2
    learn = pose_learner(dls, 'tiny', predictor_args=dict(detection_threshold=0.))
    learn.evaluate()
    assert {r['category_id'] for r in learn.results} == {2}

def in_many_shapes(path, to):
    "The drawn people, with a part of every image cut off, by turns below and on the right"
    shutil.copytree(path, to)
    for file in (to/'annotations').glob('person*.json'):
        data = json.loads(file.read_text())
        for n,info in enumerate(data['images']):
            info['width'],info['height'] = info['width'] - 100*(n % 2),info['height'] - 90*(1 - n % 2)
            picture = to/file.stem.rpartition('_')[2]/info['file_name']
            cv2.imwrite(str(picture), cv2.imread(str(picture))[:info['height'], :info['width']])
        data['annotations'] = [a for a in data['annotations'] if not a['iscrowd']]
        file.write_text(json.dumps(data))
    return to

def test_inputs_in_the_shape_of_their_images(synth, tmp_path):
    dls = small(in_many_shapes(synth, tmp_path/'shapes'), square=False)
    shapes = [{tuple(images.shape[2:]) for images,*_ in loader} for loader in dls]
    assert len(shapes[0]) > 1 and all(side % 64 == 0 for shape in set.union(*shapes) for side in shape)
    wide = [{i['width'] > i['height'] for i in (dls.train.dataset.info(i % len(dls.train.dataset)) for i in order)} for order in np.array(dls.train.get_idxs()).reshape(-1, 4)]
    assert all(len(kinds) == 1 for kinds in wide) and set.union(*wide) == {True, False}
    learn = pose_learner(dls, 'tiny', ap_every=0, predictor_args=dict(detection_threshold=0., max_people=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert np.isfinite(learn.recorder.values[0][:2]).all()
    assert len(dls.show_batch(max_n=2)) == 6

def test_the_centre_is_a_joint_of_the_network_and_not_of_the_people(synth):
    dls = small(synth, with_center=True)
    learn = pose_learner(dls, 'tiny', predictor_args=dict(detection_threshold=0., max_people=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert learn.model(dls.one_batch()[0])[1].shape[1] == 18 and learn.recorder.values[0][-1] >= 0
    assert learn.results and len(learn.results[0]['keypoints']) == 3*17
    assert len(dls.show_batch(max_n=1)) == 3

def test_batches_and_network_are_where_fastai_says(synth):
    "On a GPU, where there is one"
    dls = small(synth)
    assert dls.device == dls.train.device == dls.valid.device == default_device()
    assert small(synth, device='meta').train.device == torch.device('meta')

def test_people_are_looked_for_with_the_network_alone(synth):
    "AP within a training in bfloat16 is that of the weights it leaves"
    learn = pose_learner(small(synth, bs=8), 'tiny', cbs=[Precision('bf16'), EMA(.5)], predictor_args=dict(detection_threshold=0., max_people=2))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 3e-3)
    within = learn.results
    assert within and learn.evaluate() == pytest.approx(learn.metrics[-1].stats, nan_ok=True) and learn.results == within

def test_nothing_is_compiled_for_the_sizes_of_test_images(synth):
    def compiler(graph, inputs): raise AssertionError('compiled')
    learn = pose_learner(small(synth), 'tiny')
    learn.model.compile(backend=compiler)
    learn.predictor()(learn.dls.test.image(0))
    with pytest.raises(Exception, match='compiled'): learn.model(torch.zeros(1, 3, 64, 64, device=learn.dls.device))

# ---------------------------------------------------------------- pictures

def points(ax): return np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections]) if ax.collections else np.zeros((0, 2))

def test_a_batch_is_shown_as_the_network_gets_it(synth):
    dls = small(synth, size=128, convention='unbiased')
    before = dls.train.epoch
    input,coarse,fine = dls.show_batch(indices=[3], max_n=2)
    assert [ax.get_title() for ax in (input, coarse, fine)] == ['sample 3', '32 pixels', '64 pixels'] and dls.train.epoch == before
    shown,(images,masks,joints) = np.asarray(input.images[0].get_array()),dls.train_ds[3]
    assert shown.shape == (128, 128, 3) and (shown != images.permute(1, 2, 0).numpy()).any(-1).sum() <= (masks[1] == 0).sum()*4
    seen = joints[1][joints[1][..., 2] > 0]
    assert len(points(input)) == len(seen) > 0
    maps = np.asarray(fine.images[1].get_array())
    for x,y in points(input):
        if 1 <= x < 127 and 1 <= y < 127: assert maps[int((y+.5)//2), int((x+.5)//2)] > .75, 'a spot under each joint'

def test_results_are_shown_beside_the_truth(synth):
    dls = small(synth, size=128)
    learn = pose_learner(dls, 'tiny')
    truth,found,maps = learn.show_results(indices=[1], min_score=2)
    assert [ax.get_title() for ax in (truth, found, maps)] == ['truth', 'found', 'heatmaps']
    joints = dls.test.joints(1)
    np.testing.assert_allclose(sorted(points(truth).tolist()), sorted(joints[joints[..., 2] > 0][:, :2].tolist()))
    assert not len(points(found)), 'nobody has a score of 2'
    assert (np.asarray(truth.images[0].get_array()) == dls.test.image(1)).all()

# ---------------------------------------------------------------- AP

@pytest.mark.parametrize('every, epochs', [(2, [2, 4, 5]), (0, [5]), (1, [1, 2, 3, 4, 5])])
def test_ap_every_so_many_epochs_and_at_the_end(synth, every, epochs, monkeypatch):
    learn = pose_learner(small(synth), 'tiny', ap_every=every)
    monkeypatch.setattr(learn, 'evaluate', lambda: dict(AP=learn.epoch/10))
    learn.all_batches = lambda: None        # nothing is trained, and the loss has no value
    learn.fit(5, 0.)
    ap = next(m for m in learn.metrics if isinstance(m, AP))
    assert ap.history == [(e, (e-1)/10) for e in epochs]
    assert [i+1 for i,row in enumerate(learn.recorder.values) if row[-1] == row[-1]] == epochs

RANK = '''
import sys
from pathlib import Path
from posenb.distributed import distributed, ranks, setup_rank
from posenb.learner import pose_dls, pose_learner
setup_rank()
learn = pose_learner(pose_dls(sys.argv[1], size=64, bs=2, workers=0), 'tiny', path=sys.argv[2])
with distributed(learn), learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
(Path(sys.argv[2])/f'rank{ranks()[0]}').write_text(str(learn.recorder.values[0][-1]))
'''

def test_a_process_without_a_validation_image_takes_part_in_ap(tmp_path):
    data = synth_people(tmp_path/'data', n_train=4, n_val=1, progress=False)
    (tmp_path/'rank.py').write_text(RANK)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    done = subprocess.run([sys.executable, '-W', 'ignore', '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', tmp_path/'rank.py', data, tmp_path],
                          capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    first,second = ((tmp_path/f'rank{r}').read_text() for r in range(2))
    assert first == second != 'None'
