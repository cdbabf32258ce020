"Drawn people: labels that are true, the same ones again for the same seed, and nothing overwritten"
import json, time
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO as CocoFile
from posenb.skeleton import COCO, Skeleton
from posenb.synthetic import (CROWD, FACE, POSES, Frame, annotate, carry, draw_person, draw_scene, paint, rotation, synth_people,
                              synth_scene, to_polygons, to_rle)

def decode(ann, size):
    seg = coco_mask.frPyObjects(ann['segmentation'], size, size)
    return coco_mask.decode(seg if ann['iscrowd'] else coco_mask.merge(seg))

def facing(degrees): return Frame(np.zeros(3), np.diag([1., -1, 1])@rotation(np.radians(degrees), .1))

@pytest.fixture(scope='module')
def scenes(): return [draw_scene(np.random.default_rng((1, i)), 192) for i in range(60)]

@pytest.fixture(scope='module')
def small(tmp_path_factory): return synth_people(tmp_path_factory.mktemp('synth')/'a', n_train=6, n_val=3, size=96, seed=5, progress=False)

def contents(path): return {p.relative_to(path): p.read_bytes() for p in sorted(path.rglob('*')) if p.is_file()}

# truth

def test_masks_are_what_was_painted(scenes):
    for image,ids,people in scenes:
        anns = annotate(ids, people)
        numbers = [*range(1, len(people)+1)] + [CROWD]*bool((ids == CROWD).any())
        assert set(np.unique(ids)) - {0} == set(numbers) and len(anns) == len(numbers)
        for k,ann in zip(numbers, anns):
            mask = ids == k
            ys,xs = mask.nonzero()
            assert (decode(ann, 192) == mask).all()
            assert ann['area'] == mask.sum() and ann['iscrowd'] == (k == CROWD)
            assert list(ann['bbox']) == [xs.min(), ys.min(), xs.max()-xs.min()+1, ys.max()-ys.min()+1]

def test_visibility_is_what_is_seen(scenes):
    for image,ids,people in scenes:
        for k,(ann,person) in enumerate(zip(annotate(ids, people), people), 1):
            joints = np.reshape(ann['keypoints'], (17, 3))
            assert ann['num_keypoints'] == (joints[:, 2] > 0).sum() > 0
            for (x,y,v),hidden,true in zip(joints, person.hidden, person.joints):
                if v == 0: assert x == y == 0 and (hidden or not (0 <= true.round(1)).all() or not (true.round(1) <= 191).all())
                else:
                    assert 0 <= x <= 191 and 0 <= y <= 191 and np.abs((x, y)-true).max() <= .051
                    assert (ids[int(y+.5), int(x+.5)] == k) == (v == 2)

def test_ids_agree_with_the_picture():
    "Painted on black and on white, the difference tells how much of each pixel is covered"
    for seed in range(10):
        person = draw_person(np.random.default_rng(seed), 150, 'walk')
        black,white,ids = np.zeros((200, 200, 3), np.uint8),np.full((200, 200, 3), 255, np.uint8),np.zeros((200, 200), np.uint8)
        for image in (black, white): paint(image, ids, carry(Frame(np.array([100., 180, 0]), np.eye(3)), person.parts), 1)
        covered = 1 - (white.astype(float) - black).max(-1)/255
        assert (covered[ids == 1] > .3).all() and ((covered > .5) != ids).sum() < .05*ids.sum()
        assert (covered[cv2.dilate(ids, np.ones((5, 5))) == 0] == 0).all()

def test_joints_lie_on_the_person_alone():
    for seed in range(40):
        person = draw_person(np.random.default_rng(seed), 300, [p for p in POSES if p != 'sit'][seed%7])
        ids = np.zeros((320, 320), np.uint8)
        paint(np.zeros((320, 320, 3), np.uint8), ids, carry(Frame(np.array([160., 310, 0]), np.eye(3)), person.parts), 1)
        x,y = np.rint(person.joints[~person.hidden] + (160, 310)).astype(int).T
        assert ids[y, x].all()

@pytest.mark.parametrize('seed', range(5))
def test_from_behind_there_is_no_face_and_left_is_left(seed):
    front,behind = (draw_person(np.random.default_rng(seed), 200, 'stand', facing(d)) for d in (0, 180))
    index = COCO.names.index
    assert behind.hidden[:3].all() and not front.hidden[:3].any() and not behind.hidden[5:].any()
    left,right = index('left_shoulder'),index('right_shoulder')
    assert front.joints[left, 0] > front.joints[right, 0] and behind.joints[left, 0] < behind.joints[right, 0]
    assert set(FACE) == set(COCO.names[:5])

def test_what_a_set_contains(scenes):
    people = [p for _,_,ps in scenes for p in ps]
    length = np.array([p.size.max()/192 for p in people])
    assert .2-1e-6 <= length.min() < .3 and .8 < length.max() <= .9+1e-6
    anns = [a for _,ids,ps in scenes for a in annotate(ids, ps)]
    v = np.array([a['keypoints'][2::3] for a in anns if not a['iscrowd']])
    assert (v[:, :3] == 0).all(1).mean() > .1                 # seen from behind
    assert (v == 1).any(1).mean() > .1                         # something or somebody in front
    assert ((v[:, 5:] == 0).any(1)).mean() > .05               # cut by the image
    counts = [len(ps) for _,_,ps in scenes]
    assert 0 in counts and max(counts) >= 4 and np.mean(counts) > 1.5
    assert 2 <= sum(a['iscrowd'] for a in anns) <= 20

def test_everybody_can_be_recognised(scenes):
    for _,ids,people in scenes:
        for a in annotate(ids, people): assert a['area'] > 30 and (a['iscrowd'] or (np.reshape(a['keypoints'], (17, 3))[:, 2] > 0).any())

# masks in COCO's formats

@given(st.integers(0, 2**32-1), st.integers(1, 9), st.integers(1, 9), st.floats(.05, .95))
@settings(max_examples=150, deadline=None)
def test_any_mask_comes_back(seed, h, w, share):
    mask = (np.random.default_rng(seed).random((h, w)) < share).astype(np.uint8)
    assert (coco_mask.decode(coco_mask.frPyObjects(to_rle(mask), h, w)) == mask).all()
    if mask.any(): assert (coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(to_polygons(mask), h, w))) == mask).all()

# the dataset

def test_same_seed_same_bytes(small, tmp_path):
    again = synth_people(tmp_path/'deep'/'b', n_train=6, n_val=3, size=96, seed=5, progress=False)
    assert contents(again) == contents(small)
    larger = synth_people(tmp_path/'c', n_train=8, n_val=1, size=96, seed=5, progress=False)
    for name in ('000000000001.jpg', '000000000006.jpg'): assert (larger/'train2017'/name).read_bytes() == (small/'train2017'/name).read_bytes()
    other = synth_people(tmp_path/'d', n_train=1, n_val=1, size=96, seed=6, progress=False)
    assert (other/'train2017'/'000000000001.jpg').read_bytes() != (small/'train2017'/'000000000001.jpg').read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []

def test_layout(small, capsys):
    for name,n in (('train2017', 6), ('val2017', 3)):
        coco = CocoFile(str(small/'annotations'/f'person_keypoints_{name}.json'))
        assert len(coco.imgs) == n and Skeleton.from_coco(coco.cats[1]) == COCO
        assert tuple(map(tuple, np.array(coco.cats[1]['skeleton'])-1)) == COCO.edges
        for im in coco.imgs.values():
            assert cv2.imread(str(small/name/im['file_name'])).shape == (im['height'], im['width'], 3)
            assert len(im['file_name']) == 16
        for a in coco.anns.values(): assert a['image_id'] in coco.imgs and a['category_id'] == 1 and coco.annToMask(a).sum() == a['area']

def test_nothing_is_overwritten(small, tmp_path):
    before = contents(small)
    assert synth_people(str(small), n_train=6, n_val=3, size=96, seed=5) == small        # found
    with pytest.raises(FileExistsError, match="'seed': 5.*'seed': 0"): synth_people(small, n_train=6, n_val=3, size=96)
    assert contents(small) == before
    file = tmp_path/'file'
    file.write_text('mine')
    (tmp_path/'folder').mkdir()
    (tmp_path/'folder'/'photo.jpg').write_text('mine')
    (tmp_path/'coco'/'annotations').mkdir(parents=True)
    (tmp_path/'coco'/'annotations'/'person_keypoints_val2017.json').write_text('{"images": []}')
    for path in (file, tmp_path/'folder', tmp_path/'coco'):
        with pytest.raises(FileExistsError, match='something else.*another path'): synth_people(path)
    (tmp_path/'empty').mkdir()
    assert synth_people(tmp_path/'empty', n_train=1, n_val=0, size=64, progress=False).exists()

def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2, 'imwrite', lambda *a: False)
    with pytest.raises(OSError, match='cannot write'): synth_people(tmp_path/'a', n_train=2, n_val=1, size=64)
    assert not list(tmp_path.iterdir())

def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match='64'): synth_scene(np.random.default_rng(0), 32)
    with pytest.raises(ValueError, match='negative'): synth_people(tmp_path/'a', n_train=-1)
    with pytest.raises(ValueError): synth_people(tmp_path/'a', n_train=1, size=16)
    assert not list(tmp_path.iterdir())

def test_progress(tmp_path, capsys):
    synth_people(tmp_path/'a', n_train=2, n_val=1, size=64)
    assert 'train2017: 2 of 2' in capsys.readouterr().err

@pytest.mark.parametrize('size', (64, 100, 511))
def test_any_size(size):
    image,anns = synth_scene(np.random.default_rng(3), size)
    assert image.shape == (size, size, 3) and image.dtype == np.uint8
    for a in anns: assert decode(a, size).sum() == a['area']

def test_sample_is_what_the_program_draws(synth):
    info = json.loads((synth/'annotations'/'person_keypoints_train2017.json').read_text())['info']['synth_people']
    from posenb import synthetic
    assert info['drawing'] == synthetic._drawing
    image,anns = synth_scene(np.random.default_rng((info['seed'], 0, 0)), info['size'])
    stored = cv2.imread(str(synth/'train2017'/'000000000001.jpg'))[..., ::-1]
    assert np.abs(image.astype(int) - stored).mean() < 6
    assert sum(p.stat().st_size for p in synth.rglob('*') if p.is_file()) < 1_000_000

def test_time():
    "1,000 images in 15 s on an idle core; three times that is allowed here"
    start = time.process_time()
    for i in range(40): synth_scene(np.random.default_rng((9, i)))
    assert (time.process_time() - start)/40*1000 < 45
