"Datasets against numbers printed by the original code, the search for wrong labels, and what goes wrong with files"
import json, pickle, random, shutil, warnings, zlib
import cv2, numpy as np, pytest, torch
from collections import Counter
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra.numpy import arrays
from torch.utils.data import DataLoader
from posenb.augment import ColorJitter
from posenb.dataset import ImageFileError, PoseDataset, add_center, add_sigma, find_coco, pose_collate, read_image, worker_init
from posenb.skeleton import COCO, CROWDPOSE

opencv5 = pytest.mark.skipif(cv2.__version__ < '5', reason='the images were warped by OpenCV 5; 4.x rounds otherwise')

# ---- the original's numbers

@pytest.fixture(scope='module')
def recorded(golden): return json.loads(golden('dataset_cv5.json').read_text()), np.load(golden('dataset_cv5.npz'))

@pytest.mark.parametrize('split', ['train2017', 'val2017'])
def test_images_people_and_masks(recorded, coco_tiny, split):
    facts,stored = recorded
    ds = PoseDataset(*find_coco(coco_tiny, split))
    place = {id: i for i,id in enumerate(ds.ids.tolist())}
    images = [im['id'] for im in json.loads(find_coco(coco_tiny, split)[1].read_text())['images']]
    kept = set(facts[split]['ids']) & set(images)
    assert kept == set(facts[split]['ids']) & set(place) and len(kept) == {'train2017': 28, 'val2017': 32}[split]
    assert ds.ids.tolist() == [id for id in images if id in place]
    for item in facts[split]['items']:
        if item['image_id'] not in place: continue
        i,key = place[item['image_id']],f"{split}/{item['image_id']}"
        mask,joints = ds.mask(i),ds.joints(i)
        assert mask.shape == tuple(item['mask_shape']) and (~mask).sum() == item['mask_zeros']
        assert zlib.crc32(np.packbits(mask).tobytes()) == item['mask_crc']
        assert len(joints) == item['n_kept']
        np.testing.assert_array_equal(joints, stored[f'{key}/joints'])
        np.testing.assert_allclose(add_center(joints)[:, -1], stored[f'{key}/center'].reshape(-1, 3), rtol=1e-6)
        boxes = ds._boxes[slice(*ds._start[i:i+2])]
        np.testing.assert_allclose(add_sigma(joints, boxes)[:, 0, 3], stored[f'{key}/sigma'].reshape(-1), rtol=1e-6)

def test_a_test_uses_all_images(recorded, coco_tiny):
    whole = PoseDataset(*find_coco(coco_tiny, 'val2017'), train=False)
    assert len(whole) == 52 and len(whole) > len(PoseDataset(*find_coco(coco_tiny, 'val2017')))

class Legacy:
    "The random numbers of the original: numpy's and python's old generators, one for the mirror"
    def __init__(self, seed): self.np,self.py,self.n = np.random.RandomState(seed),random.Random(seed),0
    def random(self):
        self.n += 1
        return self.py.random() if self.n == 3 else self.np.random_sample()
    def integers(self, low, high): return self.np.randint(low, high)

@opencv5
def test_whole_training_samples(recorded, coco_tiny):
    from posenb.targets import HeatmapGenerator, JointsGenerator
    facts,stored = recorded
    ds = PoseDataset(*find_coco(coco_tiny, 'val2017'), exif=False)
    for item in facts['items_coco4']:
        i = ds.ids.tolist().index(item['image_id'])
        crop = ds.affine.draw(Legacy(item['seed']), *ds._sizes[i].tolist())
        image,masks,joints = ds.affine(ds.image(i), ds.mask(i), ds.joints(i), crop)
        pixels = ((image/np.float32(255) - np.float32([.485, .456, .406]))/np.float32([.229, .224, .225])).transpose(2, 0, 1)
        assert pixels.sum(dtype=np.float64) == pytest.approx(item['image_sum'], rel=1e-4)
        assert (pixels.astype(np.float64)**2).sum() == pytest.approx(item['image_sumsq'], rel=1e-6)
        key = f"item/{item['image_id']}/seed{item['seed']}"
        np.testing.assert_allclose(pixels[:, 4::8, 4::8], stored[f'{key}/image_8x8'], atol=1e-6)
        for s,r in enumerate(ds.affine.out_sizes):
            assert masks[s].sum() == item['mask_sum'][s]
            np.testing.assert_array_equal(np.packbits(masks[s]), stored[f'{key}/mask{s}_packbits'])
            moved = torch.from_numpy(joints[s].astype(np.float32))
            np.testing.assert_array_equal(np.asarray(JointsGenerator(30, 17, r)(moved)), stored[f'{key}/joints{s}'])
            heat = np.asarray(HeatmapGenerator(r, 17)(moved))
            assert heat.sum(dtype=np.float64) == pytest.approx(item['hm_sum'][s], rel=1e-4)
            np.testing.assert_allclose(heat[:, ::4, ::4], stored[f'{key}/hm{s}_4x4'], atol=1e-6)

def test_real_labels_are_all_but_clean(coco_tiny):
    "Few false alarms: what is reported in 225 people of COCO is one person labelled twice"
    found = [f for split in ('train2017', 'val2017') for f in PoseDataset(*find_coco(coco_tiny, split)).check()]
    assert Counter(f.kind for f in found) == {'person twice': 1}

# ---- samples

@pytest.fixture
def data(synth): return json.loads(find_coco(synth)[1].read_text())

@pytest.fixture
def changed(synth, data, tmp_path):
    "The drawn sample, in a copy whose annotation file (`save`) and images may be changed"
    shutil.copytree(find_coco(synth)[0], tmp_path/'images')
    def save(**options):
        (tmp_path/'a.json').write_text(json.dumps(data))
        return PoseDataset(tmp_path/'images', tmp_path/'a.json', **options)
    return save

def same(a, b): return all(torch.equal(x, y) for x,y in zip([a[0], *a[1], *a[2]], [b[0], *b[1], *b[2]]))

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_samples_do_not_depend_on_workers(synth, workers):
    ds = PoseDataset(*find_coco(synth), size=64, jitter=ColorJitter())
    loader = DataLoader(ds, 5, collate_fn=pose_collate, num_workers=workers, worker_init_fn=worker_init, persistent_workers=workers > 0)
    for ds.epoch in (0, 1, 0):
        direct = pose_collate([ds[i] for i in range(5)])
        assert same(next(iter(loader)), direct)
    assert ds.epoch == 0

def test_epochs_and_seeds_differ(synth):
    a,b = [PoseDataset(*find_coco(synth), size=64, seed=s) for s in (0, 1)]
    assert same(a[0], a[0]) and not same(a[0], b[0])
    b.epoch = 1
    assert a.epoch == 0 and b.epoch == 1

def test_pickles(synth):
    ds = PoseDataset(*find_coco(synth), size=64)
    assert same(ds[1], pickle.loads(pickle.dumps(ds))[1])

def test_types_and_shapes(synth):
    ds = PoseDataset(*find_coco(synth), size=128, with_center=True, scale_aware_sigma=True)
    image,masks,joints = ds[-1]
    assert image.dtype == torch.uint8 and image.shape == (3, 128, 128)
    assert [(m.dtype, m.shape) for m in masks] == [(torch.uint8, (r, r)) for r in (32, 64)]
    assert all(j.dtype == torch.float32 and j.shape[1:] == (18, 4) for j in joints)
    with pytest.raises(IndexError): ds[len(ds)]

def test_no_people_in_an_image_and_many(changed, data):
    person = data['annotations'][0]
    data['annotations'] = [dict(person, iscrowd=1, num_keypoints=0, segmentation=[], image_id=1)] + [dict(person, id=i, image_id=2) for i in range(45)]
    ds = changed(size=64)
    images,masks,joints = pose_collate([ds[0], ds[1]])
    assert [len(ds.joints(i)) for i in range(2)] == [0, 45] and joints[0].shape == (2, 45, 17, 3)
    assert pose_collate([ds[0]])[2][0].shape == (1, 1, 17, 3) and not joints[0][0].any()

def test_outlines_of_every_kind(changed, data):
    "Polygons, run lengths, compressed run lengths and boxes that are nothing"
    from pycocotools import mask as rle
    square = np.zeros((256, 256), np.uint8, order='F')
    square[10:20, 30:50] = 1
    compressed = rle.encode(square)
    runs = [30*256 + 10] + [10, 246]*19 + [10]
    outlines = [[[30, 10, 50, 10, 50, 20, 30, 20]], dict(size=[256, 256], counts=runs + [256*256 - sum(runs)]),
                dict(size=[256, 256], counts=compressed['counts'].decode()), [[1, 2, 3, 4]], []]
    crowd = dict(data['annotations'][0], iscrowd=1, num_keypoints=0, keypoints=[0]*51)
    data['annotations'] = [dict(crowd, image_id=i+1, id=i, segmentation=o) for i,o in enumerate(outlines)]
    ds = changed(size=64)
    for i in range(3): np.testing.assert_array_equal(ds.mask(i), square == 0)
    assert ds.mask(3).all() and ds.mask(4).all() and len(ds[0][2][0]) == 0

def test_unbiased_maps_agree(synth):
    ds = PoseDataset(*find_coco(synth), size=64, convention='unbiased')
    for i in range(len(ds)):
        small,large = ds[i][2]
        np.testing.assert_allclose((large[..., :2]+.5)/2 - .5, small[..., :2], atol=1e-4)

def test_reduced_reading(synth):
    plain,reduced = [PoseDataset(*find_coco(synth), size=64, max_rotation=0, reduce=r) for r in (False, True)]
    for i in range(6):
        for a,b in zip(plain[i][2], reduced[i][2]): np.testing.assert_allclose(a, b, atol=1e-4)
        difference = (cv2.blur(np.float32(plain[i][0][1]), (5, 5)) - cv2.blur(np.float32(reduced[i][0][1]), (5, 5)))[8:-8, 8:-8]
        assert np.abs(difference).mean() < 3

# ---- other formats

def test_crowdpose_layout(tmp_path, golden):
    gt = json.loads(golden('crowdpose_eval_gt.json').read_text())
    (tmp_path/'json').mkdir()
    (tmp_path/'images').mkdir()
    (tmp_path/'json/crowdpose_test.json').write_text(json.dumps(gt))
    for im in gt['images']: cv2.imwrite(str(tmp_path/'images'/im['file_name']), np.zeros((im['height'], im['width'], 3), np.uint8))
    ds = PoseDataset(*find_coco(tmp_path, 'test'), skeleton=CROWDPOSE, size=64)
    assert [ds.info(i)['id'] for i in range(len(ds))] == [int(ds.info(i)['file_name'].split('.')[0]) for i in range(len(ds))]
    assert ds.mask(0).all() and ds[0][2][0].shape[1:] == (14, 3)
    assert PoseDataset(*find_coco(tmp_path, 'test'), skeleton=None).skeleton == CROWDPOSE

def test_own_joints(changed, data):
    data['categories'] = [dict(id=7, name='mouse', keypoints=['nose', 'left_ear', 'right_ear', 'tail'], skeleton=[[1, 2]])]
    for a in data['annotations']: a.update(category_id=7, keypoints=a['keypoints'][:12])
    ds = changed(skeleton=None, category='mouse', size=64)
    assert ds.skeleton.flip_index.tolist() == [0, 2, 1, 3] and ds[0][2][0].shape[1:] == (4, 3)
    with pytest.raises(ValueError, match='4 joints, the skeleton 17'): changed(category='mouse')

def test_people_of_other_categories_are_left_out(changed, data):
    n = len(changed()._joints)
    data['annotations'].append(dict(data['annotations'][0], id=99, category_id=2))
    assert len(changed()._joints) == n

# ---- files

def with_exif(path, orientation):
    "Write an EXIF orientation into a JPEG"
    tiff = b'MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00' + bytes([orientation]) + b'\x00\x00\x00\x00\x00\x00'
    segment = b'\xff\xe1' + (len(tiff)+8).to_bytes(2, 'big') + b'Exif\x00\x00' + tiff
    data = path.read_bytes()
    path.write_bytes(data[:2] + segment + data[2:])

def test_exif(tmp_path, changed, data):
    x = np.zeros((40, 60, 3), np.uint8)
    x[:20] = 255
    path = tmp_path/'images'/data['images'][0]['file_name']
    cv2.imwrite(str(path), x)
    with_exif(path, 6)
    assert read_image(path).shape == (60, 40, 3) and read_image(path, exif=False).shape == (40, 60, 3)
    assert read_image(path)[:, 25:].min() > 240 and read_image(path, reduce=2).shape == (30, 20, 3)
    data['images'][0].update(width=40, height=60)
    assert changed().image(0).shape == (60, 40, 3)
    with pytest.raises(ImageFileError, match='60 x 40 pixels'): changed(exif=False).image(0)

@pytest.mark.parametrize('ext', ['jpg', 'png'])
@pytest.mark.parametrize('reduce', [2, 4, 8])
def test_reading_at_a_fraction(tmp_path, ext, reduce):
    x = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 16, 3), dtype=np.uint8), (255, 129), interpolation=cv2.INTER_CUBIC)
    cv2.imwrite(str(tmp_path/f'x.{ext}'), x, [cv2.IMWRITE_JPEG_QUALITY, 100])
    full,small = [read_image(tmp_path/f'x.{ext}', reduce=r) for r in (1, reduce)]
    assert small.shape == (-(-129//reduce), -(-255//reduce), 3)
    whole = full[:128, :255//reduce*reduce].reshape(128//reduce, reduce, -1, reduce, 3).mean((1, 3))
    np.testing.assert_allclose(small[:len(whole), :whole.shape[1]], whole, atol=8)

@pytest.mark.parametrize('kind,ext', [('preview', 'jpg'), ('progressive', 'jpg'), ('plain', 'jpg'), ('plain', 'png')])
@pytest.mark.parametrize('share', [.02, .3, .7, .99])
def test_files_that_break_off(tmp_path, kind, ext, share):
    x = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    path = tmp_path/f'x.{ext}'
    cv2.imwrite(str(path), x, [cv2.IMWRITE_JPEG_PROGRESSIVE, int(kind == 'progressive')] if ext == 'jpg' else [])
    data = path.read_bytes()
    if kind == 'preview': data = data[:2] + b'\xff\xe1' + (len(data)+2).to_bytes(2, 'big') + data + data[2:]     # a whole JPEG inside of a segment
    for tail in (b'', b'\x00'*40) if ext == 'jpg' else (b'',):
        path.write_bytes(data + tail)
        assert read_image(path).shape == (40, 40, 3)
    path.write_bytes(data[:int(share*len(data))])
    with pytest.raises(ImageFileError, match='breaks off|not an image'): read_image(path)

@pytest.mark.parametrize('how', ['empty', 'cut', 'gone', 'resized'])
def test_bad_files_are_skipped_in_training_only(changed, tmp_path, how):
    ds = changed(size=64)
    path = ds.path(0)
    if how == 'gone': path.unlink()
    elif how == 'resized': cv2.imwrite(str(path), np.zeros((10, 10, 3), np.uint8))
    else: path.write_bytes(path.read_bytes()[:0 if how == 'empty' else 3000])
    with pytest.warns(UserWarning, match=path.name): sample = ds[0]
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        assert same(sample, ds[0]) and same(sample, ds[1])
    assert ds.skipped == [str(path)]
    with pytest.raises(ImageFileError, match=path.name): changed(train=False)[0]
    assert [(f.kind, f.file) for f in ds.check()] == [('file', path.name)]

def test_skipped_is_known_to_the_main_process(changed):
    ds = changed(size=64)
    ds.path(3).write_bytes(b'')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in DataLoader(ds, 4, collate_fn=pose_collate, num_workers=2): pass
    assert ds.skipped == [str(ds.path(3))]

def test_no_file_can_be_read(changed):
    ds = changed(size=64)
    for i in range(len(ds)): ds.path(i).write_bytes(b'')
    with pytest.raises(ImageFileError, match='none of 15 images'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        ds[0]

# ---- wrong labels: each kind, planted in one person

def facing(data):
    "An annotation whose face, shoulders and hips are labelled"
    return next(a for a in data['annotations'] if not a['iscrowd'] and all(a['keypoints'][3*k+2] for k in (0, 1, 2, 5, 6, 11, 12)))

def outside(data, a): a['keypoints'][0:3] = [-3, 20, 2]; a['bbox'] = [0, 0, 256, 256]; a['num_keypoints'] = sum(v > 0 for v in a['keypoints'][2::3])
def far(data, a): a['bbox'] = [0, 0, 20, 30]
def miscounted(data, a): a['num_keypoints'] += 1
def flat(data, a): a['bbox'][2] = 0
def swapped(data, a): a['keypoints'] = np.reshape(a['keypoints'], (17, 3))[COCO.flip_index].flatten().tolist()
def upside_down_and_swapped(data, a):
    k = np.reshape(a['keypoints'], (17, 3))
    seen = k[:, 2] > 0
    k[seen, :2] = 2*k[seen, :2].mean(0) - k[seen, :2]
    a['bbox'] = [*k[seen, :2].min(0), *np.ptp(k[seen, :2], axis=0)]
    swapped(data, a)
def twice(data, a): data['annotations'].append(dict(a, id=999, keypoints=[x + (i % 3 != 2 and x > 0) for i,x in enumerate(a['keypoints'])]))

@pytest.mark.parametrize('plant,kind', [(outside, 'joint outside the image'), (far, 'joint far outside the box'), (miscounted, 'num_keypoints'),
                                        (flat, 'box of no area'), (swapped, 'left and right exchanged'),
                                        (upside_down_and_swapped, 'left and right exchanged'), (twice, 'person twice')])
def test_planted_mistakes_are_found(changed, data, plant, kind):
    assert changed().check() == []
    person = facing(data)
    plant(data, person)
    found = changed().check(files=False)
    assert [(f.kind, f.annotation) for f in found if f.kind != 'joint outside the image' or plant is outside] == [(kind, 999 if plant is twice else person['id'])]
    assert kind in repr(found) and kind in found._repr_markdown_()

# ---- any joints, boxes and skeletons

coordinates = st.one_of(st.just(0), st.floats(-50, 300, width=32))

@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.integers(1, 30), st.integers(0, 6))
def test_any_labels(tmp_path, any_, n_joints, n_people):
    "Whatever the labels: they are kept, checked, cropped and collated"
    cv2.imwrite(str(tmp_path/'x.png'), np.zeros((60, 200, 3), np.uint8))
    rows = any_.draw(arrays(np.float32, (n_people, n_joints, 3), elements=coordinates))
    rows[..., 2] = any_.draw(arrays(np.int64, (n_people, n_joints), elements=st.integers(0, 2)))
    boxes = any_.draw(arrays(np.float32, (n_people, 4), elements=coordinates))
    people = [dict(id=i, image_id=0, category_id=1, iscrowd=0, keypoints=r.flatten().tolist(), bbox=b.tolist()) for i,(r,b) in enumerate(zip(rows, boxes))]
    people.append(dict(id=99, image_id=0, category_id=1, iscrowd=1))
    category = dict(id=1, name='person', keypoints=[f'joint{k}' for k in range(n_joints)])
    (tmp_path/'a.json').write_text(json.dumps(dict(images=[dict(id=0, file_name='x.png', width=200, height=60)], annotations=people, categories=[category])))
    ds = PoseDataset(tmp_path, tmp_path/'a.json', skeleton=None, size=32, with_center=True, scale_aware_sigma=True)
    np.testing.assert_array_equal(ds.joints(0)[:, :-1, :3], rows)
    image,masks,joints = pose_collate([ds[0], ds[0]])
    assert joints[0].shape == (2, max(1, n_people), n_joints+1, 4) and torch.isfinite(joints[1]).all()
    flat = {f.annotation for f in ds.check() if f.kind == 'box of no area'}
    assert flat == {i for i,b in enumerate(boxes) if (b[2:] <= 0).any()}

# ---- errors

def test_errors_name_what_is_there(synth, tmp_path):
    folder,file = find_coco(synth)
    with pytest.raises(FileNotFoundError, match='nowhere'): find_coco(tmp_path/'nowhere')
    with pytest.raises(FileNotFoundError, match='none of these exists.*person_keypoints_test'): find_coco(synth, 'test')
    with pytest.raises(FileNotFoundError, match='no such annotation file'): PoseDataset(folder, tmp_path/'none.json')
    with pytest.raises(ValueError, match='these ids'): PoseDataset(folder, file, ids=[12345])
    with pytest.raises(ValueError, match='convention'): PoseDataset(folder, file, convention='best')
    (tmp_path/'bad.json').write_bytes(b'\xff\xfe\x00')
    with pytest.raises(ValueError, match='bad.json is not JSON'): PoseDataset(folder, tmp_path/'bad.json')

def without(record, field): del record[field]

malformed = [
    (lambda d: d.update(images=None), "'images' must be a list of records; it is None"),
    (lambda d: d.update(annotations=None), "'annotations' must be a list of records; it is None"),
    (lambda d: d.update(categories=None), "'categories' must be a list of records; it is None"),
    (lambda d: without(d['images'][2], 'id'), r"images\[2\] \(id None\): 'id' must be a number or a text; it is missing"),
    (lambda d: without(d['images'][2], 'file_name'), r"images\[2\] \(id 3\): 'file_name' must be the name of a file; it is missing"),
    (lambda d: d['images'][2].update(width=0), r"images\[2\] \(id 3\): 'width' must be a number of pixels; it is 0"),
    (lambda d: d['images'].append('x.jpg'), r"images\[16\] must be a record {...}; it is 'x.jpg'"),
    (lambda d: without(d['categories'][0], 'id'), r"categories\[0\] \(id None\): 'id' must be"),
    (lambda d: d['categories'][0].update(keypoints='nose'), r"categories\[0\] \(id 1\): 'keypoints' must be a list of the names"),
    (lambda d: d['categories'][0].update(skeleton=[1, 2]), r"categories\[0\] \(id 1\): 'skeleton' must be a list of pairs"),
    (lambda d: without(d['annotations'][1], 'image_id'), r"annotations\[1\] \(id 2\): 'image_id' must be the id of an image; it is missing"),
    (lambda d: without(d['annotations'][1], 'category_id'), r"annotations\[1\] \(id 2\): 'category_id' must be the id of a category; it is missing"),
    (lambda d: d['annotations'][1]['keypoints'].__setitem__(3, 'far left'), r"annotations\[1\] \(id 2\): 'keypoints' must be a list of numbers"),
    (lambda d: d['annotations'][1].update(bbox=[1, 2, 3]), r"annotations\[1\] \(id 2\): 'bbox' must be four numbers.*; it is \[1, 2, 3\]"),
    (lambda d: d['annotations'][1].update(segmentation=[1, 2, 3, 4, 5, 6]), r"annotations\[1\] \(id 2\): 'segmentation' must be a list of polygons"),
    (lambda d: d['annotations'][1].update(segmentation=dict(size=[256, 256])), r"annotations\[1\] \(id 2\): 'segmentation' must be"),
    (lambda d: d['annotations'][1].update(num_keypoints='all'), r"annotations\[1\] \(id 2\): 'num_keypoints' must be a number; it is 'all'")]

@pytest.mark.parametrize('change,message', malformed)
def test_malformed_records_are_named(changed, data, change, message):
    change(data)
    with pytest.raises(ValueError, match=r'a\.json: ' + message): changed()

junk = st.sampled_from([None, 0, -1, 1, 2.5, '', 'x', [], [1, 2, 3], [1, 2, 3, 4], [[1, 2]], [[1, 2, 3, 4, 5, 6]], ['a'], {}, True, 10**4, float('nan'),
                        dict(size=[256, 256], counts=[65536]), dict(size=[9, 9], counts=[81]), dict(size=[256, 256], counts=[3])])

@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_file_is_either_read_or_refused_with_its_name(synth, tmp_path_factory, any_):
    "Any field of any record replaced by anything, or left out"
    data = json.loads(find_coco(synth)[1].read_text())
    records = data[any_.draw(st.sampled_from(['images', 'annotations', 'categories']))]
    record = records[any_.draw(st.integers(0, len(records)-1))]
    field = any_.draw(st.sampled_from(sorted(record)))
    if any_.draw(st.booleans()): record[field] = any_.draw(junk)
    else: del record[field]
    file = tmp_path_factory.mktemp('any')/'a.json'
    file.write_text(json.dumps(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            ds = PoseDataset(find_coco(synth)[0], file, skeleton=any_.draw(st.sampled_from([COCO, None])))
            ds.check(files=False)
            for i in range(len(ds)): ds.mask(i)
    except ValueError as e: assert 'a.json' in str(e)

def test_run_lengths_of_another_size(changed, data):
    crowd = dict(data['annotations'][1], iscrowd=1, num_keypoints=0, segmentation=dict(size=[128, 256], counts=[128*256]))
    data['annotations'][1] = crowd
    with pytest.raises(ValueError, match='a.json: annotation 2 of image .*: its run lengths are of an image of 256 x 128 pixels, the image has 256 x 256'): changed()
    crowd['segmentation'] = dict(size=[256, 256], counts=[5])
    with pytest.raises(ValueError, match='annotation 2 of image .*: its run lengths cover 5 pixels'): changed()
    crowd.update(iscrowd=0, num_keypoints=9)
    changed()     # the outline of a person with joints is not used

def test_train_and_val_joined(tmp_path, golden):
    gt = json.loads(golden('crowdpose_eval_gt.json').read_text())
    for folder in ('json', 'images'): (tmp_path/folder).mkdir()
    for im in gt['images']: cv2.imwrite(str(tmp_path/'images'/im['file_name']), np.zeros((im['height'], im['width'], 3), np.uint8))
    for split,part in (('train', gt['images'][:2]), ('val', gt['images'][2:])):
        people = [a for a in gt['annotations'] if a['image_id'] in [im['id'] for im in part]]
        (tmp_path/f'json/crowdpose_{split}.json').write_text(json.dumps({**gt, 'images': part, 'annotations': people}))
    with pytest.raises(FileNotFoundError, match="made once, of 'train' and 'val': python -c") as e: find_coco(tmp_path, 'trainval')
    exec(str(e.value).split('python -c ')[1].strip('"'))
    (tmp_path/'json/crowdpose_test.json').write_text(json.dumps(gt))
    joined,whole = [PoseDataset(*find_coco(tmp_path, s), skeleton=None) for s in ('trainval', 'test')]
    assert joined.ids.tolist() == whole.ids.tolist() and (joined._joints == whole._joints).all() and joined.check() == whole.check()

@pytest.mark.parametrize('rename,error', [(str.upper, None), (lambda n: n.replace('_', ' '), None), (lambda n: n.replace('eye', 'horn'), None),
                                          (lambda n: COCO.names[COCO.names.index(n)-2].replace('ear', 'fin'), 'are no mirror images there')])
def test_other_names_than_the_skeletons(changed, data, rename, error):
    "A warning; an error where the file's names are mirror images that the skeleton does not have"
    data['categories'][0]['keypoints'] = [rename(n) for n in COCO.names]
    said = pytest.raises(ValueError, match=error) if error else pytest.warns(UserWarning, match="a.json: joints of 'person' have other names than the skeleton's, for instance")
    with said: changed(skeleton=COCO)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        changed(skeleton=None)

def test_no_mirror_pair_at_all(changed, data):
    "A warning where images will be mirrored, and nowhere else"
    data['categories'][0]['keypoints'] = [f'joint{i}' for i in range(17)]
    with pytest.warns(UserWarning, match='a.json: no joint of the skeleton has a mirror image.*flip=0'): changed(skeleton=None)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for kw in (dict(flip=0), dict(train=False)): changed(skeleton=None, **kw)

def test_entries_that_do_not_belong_together(changed, data):
    assert changed().check(files=False) == []
    data['annotations'].append(dict(data['annotations'][0], id=77, image_id=4711))
    data['images'] += [data['images'][0], dict(data['images'][1], id=4712), dict(data['images'][2], file_name='x.jpg')]
    found = [tuple(f) for f in changed(train=False).check(files=False) if f.kind != 'person twice']
    assert found[0] == ('image not listed', '', 77, 'image_id 4711')
    assert [f[:2] for f in found[1:]] == [('image twice', data['images'][0]['file_name']), ('image twice', data['images'][1]['file_name']), ('image twice', 'x.jpg')]

def test_fill_bytes_and_what_follows_the_end(tmp_path):
    "A JPEG may repeat FF before each segment, a PNG be followed by anything; cut ones are still found"
    x = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    jpeg,png = [cv2.imencode(ext, x)[1].tobytes() for ext in ('.jpg', '.png')]
    at,filled = 2,jpeg[:2]
    while jpeg[at+1] != 0xda:
        end = at + 2 + int.from_bytes(jpeg[at+2:at+4], 'big')
        filled,at = filled + b'\xff'*(at % 3) + jpeg[at:end],end
    filled += b'\xff\xff' + jpeg[at:]
    for name,data in (('x.jpg', filled), ('y.png', png + b'\0'*500), ('z.png', png + b'IEND of file')):
        (tmp_path/name).write_bytes(data)
        assert (read_image(tmp_path/name) == cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)).all()
    for name,data in (('x.jpg', filled[:-2]), ('y.png', png[:-12]), ('z.png', png[:len(png)//2] + b'IEND')):
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ImageFileError, match='breaks off'): read_image(tmp_path/name)
