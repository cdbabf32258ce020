"Augmentation against numbers printed by the original code, and against itself"
import json
import cv2, numpy as np, pytest
from hypothesis import given, settings, strategies as st
from posenb import augment
from posenb.augment import Crop, RandomAffine, affine_matrix, mirror_joints, reduce_sample, resize_matrix, transform_points, warp
from posenb.skeleton import COCO

opencv5 = pytest.mark.skipif(cv2.__version__ < '5', reason='the images were warped by OpenCV 5; 4.x rounds otherwise')

@pytest.fixture(scope='module')
def affine(golden): return json.loads(golden('affine_cv5.json').read_text()), np.load(golden('affine_cv5.npz'))

class Replay:
    "A random generator that returns given numbers"
    def __init__(self, floats, ints): self.floats,self.ints,self.limits = list(floats),list(ints),[]
    def random(self): return self.floats.pop(0)
    def integers(self, low, high):
        self.limits.append((low, high))
        return self.ints.pop(0)

def test_matrices(affine):
    for m in affine[0]['matrices']:
        np.testing.assert_allclose(affine_matrix(m['center'], m['scale'], m['rot'], m['res']), np.array(m['mat'])[:2], rtol=0, atol=1e-9)

@opencv5
def test_train_cases(affine):
    cases,arrays = affine
    for case in cases['train_cases']:
        get = lambda name: arrays[f"{case['name']}/{name}"]
        random_affine = RandomAffine(case['input_size'], case['output_size'], np.append(COCO.flip_index, 17)[:get('joints').shape[1]], case['max_rotation'],
                                     (case['min_scale'], case['max_scale']), case['scale_type'], case['max_translate'])
        rng = Replay([case['u_scale'], case['u_rot'], case['u_flip']], [case['dx'], case['dy']])
        crop = random_affine.draw(rng, case['w'], case['h'])
        assert rng.limits == [(int(low), int(high)) for low,high in case['randint_limits']]
        image,masks,joints = random_affine(get('image'), get('mask'), get('joints'), crop)
        np.testing.assert_array_equal(image, get('out_image'))
        for i in range(2):
            np.testing.assert_array_equal(masks[i], get(f'out_mask{i}'))
            np.testing.assert_allclose(joints[i], get(f'out_joints{i}'), rtol=0, atol=1e-9)

def test_test_sizes(affine):
    for t in affine[0]['test_sizes']:
        size = augment.test_size(t['w'], t['h'], t['input_size'], t['scale_factor'], t['min_scale'])
        assert size == tuple(t['size_wh'])
        np.testing.assert_allclose(resize_matrix(t['w'], t['h'], size), t['trans'], rtol=0, atol=1e-9)
        np.testing.assert_allclose(resize_matrix(t['w'], t['h'], size, inverse=True), t['inv'], rtol=0, atol=1e-9)

@opencv5
@pytest.mark.parametrize('name', ['test_a', 'test_b', 'test_c', 'test_d'])
def test_resized_images(affine, name):
    case,image = affine[0][name],affine[1][f'{name}/image']
    size = augment.test_size(case['w'], case['h'], case['input_size'], case['scale'], case['min_scale'])
    resized,_ = warp(image, resize_matrix(case['w'], case['h'], size), size)
    np.testing.assert_array_equal(resized, affine[1][f'{name}/resized'])

def test_back_projection(affine):
    case = affine[0]['final_preds']
    size = case['heatmap_size_wh']
    back = cv2.getAffineTransform(augment._three_points((size[0]/2, size[1]/2), size[0]*.5), augment._three_points(case['center'], case['scale'][0]*200*.5))
    np.testing.assert_allclose(transform_points(affine[1]['final_preds/in'], back), affine[1]['final_preds/out'], rtol=0, atol=1e-4)

# ---- properties

crops = st.builds(Crop, st.tuples(st.floats(10, 90), st.floats(10, 70)), st.floats(.2, .8), st.floats(-180, 180), st.booleans())
image = np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8)

@settings(deadline=None, max_examples=40)
@given(crops)
def test_one_warp_is_three(crop):
    "Image and masks of one call are those of separate ones"
    mask = np.zeros((80, 100), bool)
    mask[20:60, 30:90] = True
    random_affine = RandomAffine(128, flip_index=COCO.flip_index)
    out,masks,_ = random_affine(image, mask, np.zeros((0, 17, 3)), crop)
    mirror = (lambda x: x[:, ::-1]) if crop.flip else (lambda x: x)
    np.testing.assert_array_equal(out, mirror(cv2.warpAffine(image, affine_matrix(crop.center, crop.scale, crop.rot, 128), (128, 128))))
    for m,r in zip(masks, (32, 64)):
        separate = cv2.warpAffine(np.uint8(mask*255), affine_matrix(crop.center, crop.scale, crop.rot, r), (r, r)) > 127
        np.testing.assert_array_equal(m, mirror(separate))

@settings(deadline=None, max_examples=20)
@given(crops)
def test_unbiased_masks(crop):
    "A mask read from the input's is that of a warp of its own, up to the rim"
    random_affine = RandomAffine(128, flip_index=COCO.flip_index, convention='unbiased')
    _,masks,_ = random_affine(image, None, np.zeros((0, 17, 3)), crop)
    for m,r in zip(masks, (32, 64)):
        own = cv2.warpAffine(np.full((80, 100), 255, np.uint8), affine_matrix(crop.center, crop.scale, crop.rot, r, 'unbiased'), (r, r)) > 127
        assert (m != (own[:, ::-1] if crop.flip else own)).mean() < .02

@settings(deadline=None, max_examples=40)
@given(crops, st.sampled_from(['original', 'unbiased']))
def test_joint_stays_on_its_pixel(crop, convention):
    "A soft spot in the image, warped, is where its joint says"
    x,y = crop.center[0] + 4, crop.center[1] - 3
    gx,gy = np.meshgrid(np.arange(100), np.arange(80))
    spot = np.repeat(np.uint8(255*np.exp(-((gx-x)**2 + (gy-y)**2)/18))[..., None], 3, 2)
    random_affine = RandomAffine(128, (128,), [0], convention=convention)
    out,_,(joints,) = random_affine(np.pad(spot, ((100, 100), (100, 100), (0, 0))), None, np.array([[[x+100, y+100, 2.]]]),
                                    Crop((crop.center[0]+100, crop.center[1]+100), crop.scale, crop.rot, crop.flip))
    weight = out[..., 0].astype(float)
    seen = np.array([(weight*grid).sum() for grid in np.meshgrid(np.arange(128), np.arange(128))])/weight.sum()
    inside = (np.abs(np.array([x, y]) - [50, 40]) < [35, 25]).all()
    if inside: np.testing.assert_allclose(joints[0, 0, :2], seen, atol=.3)

@given(st.integers(1, 40).map(lambda n: 32*n), st.floats(-100, 2000))
def test_unbiased_mirror_agrees_at_every_size(size, x):
    to_map = lambda x,r: (affine_matrix((size/2, size/2), size/200, 0, r, 'unbiased') @ [x, 0, 1])[0]
    for r in (size//4, size//2): np.testing.assert_allclose(to_map(size-1-x, r), r-1-to_map(x, r), atol=1e-8)

@given(st.integers(0, 5), st.integers(1, 600))
def test_mirror_twice_is_nothing(people, size):
    joints = np.random.default_rng(people).uniform(0, size, (people, 17, 3))
    np.testing.assert_allclose(mirror_joints(mirror_joints(joints, size, COCO.flip_index), size, COCO.flip_index), joints)

@given(st.integers(1, 2000), st.integers(1, 2000), st.sampled_from([256, 512, 640]), st.sampled_from([(1, 1), (.5, .5), (1, .5), (2, .5)]))
def test_sizes_fit_the_network(w, h, size, scales):
    width,height = augment.test_size(w, h, size, *scales)
    assert width % 32 == 0 and height % 32 == 0 and min(width, height) == size*scales[0]
    assert (width >= height) == (w >= h) or width == height

@pytest.mark.parametrize('convention', ['original', 'unbiased'])
@pytest.mark.parametrize('w,h', [(640, 427), (300, 500), (64, 64)])
def test_resize_matrix_back_and_forth(w, h, convention):
    size = augment.test_size(w, h, 256)
    points = np.random.default_rng(0).uniform(0, 300, (20, 2))
    there = transform_points(points, resize_matrix(w, h, size, convention=convention))
    np.testing.assert_allclose(transform_points(there, resize_matrix(w, h, size, inverse=True, convention=convention)), points, atol=2e-3)

@settings(deadline=None, max_examples=30)
@given(crops, st.sampled_from([2, 4, 8]), st.sampled_from(['original', 'unbiased']))
def test_reduced_joints_are_the_same(crop, r, convention):
    joints = np.random.default_rng(0).uniform(0, 80, (3, 17, 3))
    random_affine = RandomAffine(64, flip_index=COCO.flip_index, convention=convention)
    _,_,full = random_affine(image, None, joints, crop)
    small = cv2.resize(image, (-(-100//r), -(-80//r)), interpolation=cv2.INTER_AREA)
    mask,moved,smaller = reduce_sample(np.ones((80, 100), bool), joints, crop, r, convention)
    assert mask.shape == small.shape[:2]
    for a,b in zip(full, random_affine(small, mask, moved, smaller)[2]): np.testing.assert_allclose(a, b, atol=1e-8)

@settings(deadline=None, max_examples=30)
@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 100))
def test_draws_stay_in_their_limits(w, h, seed):
    crop = RandomAffine(256, flip_index=[0]).draw(np.random.default_rng(seed), w, h)
    short = min(w, h)
    assert .75*short <= 200*crop.scale <= 1.5*short and abs(crop.rot) <= 30
    assert all(abs(c - side/2) <= .2*200*crop.scale for c,side in zip(crop.center, (w, h)))

@settings(deadline=None, max_examples=30)
@given(st.integers(20, 300), st.integers(20, 300), st.booleans())
def test_whole_images_are_those_of_the_test(w, h, flip):
    "Without zoom, turn and shift; a joint counts if it lies on the map"
    random_affine = RandomAffine(64, flip_index=COCO.flip_index, max_rotation=0, max_translate=0, scale_range=(1, 1), flip=float(flip), convention='unbiased', square=False)
    picture,joints = np.random.default_rng(w).integers(0, 256, (h, w, 3), np.uint8),np.random.default_rng(h).uniform(-.2, 1.2, (3, 17, 3))*[w, h, 0] + [0, 0, 1]
    crop = random_affine.draw(np.random.default_rng(0), w, h)
    assert crop.shape == augment.test_size(w, h, 64) and crop.flip == flip
    matrix = resize_matrix(w, h, crop.shape, convention='unbiased')
    seen,masks,maps = random_affine(picture, None, joints, crop)
    expected = warp(picture, matrix, crop.shape)[0]
    assert np.abs(seen[:, ::-1 if flip else 1].astype(int) - expected).mean() < .5      # resize_matrix computes in single precision
    for mask,moved,step in zip(masks, maps, (4, 2)):
        assert mask.shape == tuple(side//step for side in crop.shape[::-1])
        there = (transform_points(joints, matrix)[..., :2] + .5)/step - .5
        if flip: there = mirror_joints(there, crop.shape[0]//step, COCO.flip_index)
        np.testing.assert_allclose(moved[..., :2], there, atol=2e-3)
        on_map = (np.floor(moved[..., :2] + .5) < mask.shape[::-1]).all(-1)
        np.testing.assert_array_equal(moved[..., 2], on_map)

def test_colours_against_the_long_way():
    jitter = augment.color_matrix(brightness=1.2, contrast=.7, saturation=.5, mean=100.)
    x = np.random.default_rng(0).uniform(60, 180, (50, 3))
    step = x*1.2
    step = .7*step + .3*120
    grey = step @ [.299, .587, .114]
    step = .5*step + .5*grey[:, None]
    np.testing.assert_allclose(x @ jitter[:, :3].T + jitter[:, 3], step, atol=1e-9)
