"Prediction: the original's people on real images, the ceiling of the decoder, mirrors, sizes and batches, clear errors on bad input"
import json
from functools import cache
import cv2, numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from posenb.dataset import PoseDataset, find_coco
from posenb.evaluate import coco_ap, to_results
from posenb.model import fuse_bn, higher_hrnet
from posenb.predict import Oracle, Predictor, network_input, oracle_results, predict_dataset, unmirror
from posenb.skeleton import COCO, Skeleton

@pytest.fixture(autouse=True, scope='module')
def one_thread():
    before = torch.get_num_threads(),cv2.getNumThreads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    yield
    torch.set_num_threads(before[0])
    cv2.setNumThreads(before[1])

# ---- the original's people on real images

cases = {'A_default': {}, 'B_noflip': dict(flip=False), 'C_multiscale': dict(scales=(.5, 1, 2)), 'D_noproject': dict(project2image=False),
         'E_norefine_noadjust': dict(refine=False, adjust=False)}
ids = (217285, 350679, 151938, 536038)

@pytest.fixture(scope='module')
def printed(golden): return np.load(golden('inference_cv5.npz')),json.loads(golden('inference_cv5.json').read_text())

@pytest.fixture(scope='module')
def trained(golden):
    reduced = dict(width=8, modules=(1,2,2), blocks=2, deconv_width=8, deconv_blocks=2)
    return higher_hrnet('w32', pretrained=golden('net_tiny_trained.pth'), **reduced)

@pytest.fixture(scope='module')
def photos(coco_tiny):
    ds = PoseDataset(*find_coco(coco_tiny, 'val2017'), train=False, ids=ids, exif=False)
    return {ds.ids[i].item(): ds.image(i) for i in range(len(ds))}

@pytest.fixture(scope='module')
def found(trained, photos):
    "The people of each image, by case"
    return cache(lambda case: {i: Predictor(trained, size=256, solver='munkres', **cases[case])(image) for i,image in photos.items()})

@pytest.mark.parametrize('case', cases)
def test_golden(printed, found, case):
    for i in ids:
        want,scores,people = printed[0][f'{case}/{i}/final'],printed[0][f'{case}/{i}/scores'],found(case)[i]
        assert people.keypoints.shape == (*want.shape[:2], 3) and people.tags.shape == (*want.shape[:2], want.shape[2] - 3)
        np.testing.assert_allclose(people.keypoints[..., :2], want[..., :2], rtol=0, atol=1e-3)
        np.testing.assert_allclose(people.keypoints[..., 2], want[..., 2], rtol=0, atol=1e-4)
        np.testing.assert_allclose(people.tags, want[..., 3:], rtol=0, atol=1e-3)
        np.testing.assert_allclose(people.scores, scores, rtol=0, atol=1e-4)

def test_maps_golden(printed, trained, photos):
    predictor = Predictor(trained, size=256)
    for i in ids:
        heat,tags = predictor.maps(photos[i])
        np.testing.assert_allclose(heat[:, ::8, ::8], printed[0][f'A_default/{i}/heatmaps_8x8'], rtol=0, atol=1e-4)
        np.testing.assert_allclose(tags[:, ::8, ::8], printed[0][f'A_default/{i}/tags_8x8'], rtol=0, atol=1e-3)

@pytest.mark.parametrize('case', ['A_default', 'B_noflip', 'E_norefine_noadjust'])
def test_records_golden(golden, coco_tiny, found, printed, case):
    "The result file, and its AP"
    want = json.loads(golden(f'inference_cv5_{case}_results.json').read_text())
    have = [r for i in ids for r in to_results(found(case)[i], i)]
    for i in ids:
        a,b = ([r for r in results if r['image_id'] == i] for results in (have, want))
        assert len(a) == len(b)
        for key in ('keypoints', 'score'): np.testing.assert_allclose([r[key] for r in a], [r[key] for r in b], rtol=0, atol=1e-3)
    stats,ap = printed[1][case]['coco_stats'],coco_ap(find_coco(coco_tiny, 'val2017')[1], have, image_ids=ids)
    for name,key in [('AP', 'AP'), ('Ap .5', 'AP50'), ('AP (M)', 'APm'), ('AP (L)', 'APl'), ('AR', 'AR')]: assert abs(stats[name] - ap[key]) < 1e-3

# ---- the ceiling of the decoder

@pytest.fixture(scope='module')
def oracle_json(golden): return json.loads(golden('oracle.json').read_text())

@pytest.fixture(scope='module')
def annotated(coco_tiny, oracle_json): return PoseDataset(*find_coco(coco_tiny, 'val2017'), train=False, ids=oracle_json['image_ids'])

def oracle_aps(ds, groupings, convention='original', **settings):
    "COCO numbers of a perfect network for each of several `groupings`, which share the maps"
    oracle,results = Oracle(convention=convention),[[] for _ in groupings]
    predictors = [Predictor(oracle, convention=convention, **settings, **g) for g in groupings]
    for i in range(len(ds)):
        info,joints = ds.info(i),ds.joints(i)
        image = np.zeros((info['height'], info['width'], 3), np.uint8)    # the oracle does not look at it
        oracle.look(joints[(joints[..., 2] > 0).any(1)], image.shape[1::-1])
        maps = next(predictors[0].batch_maps([image]))
        for r,p in zip(results, predictors): r += to_results(p.people(*maps, image.shape[1::-1]), info['id'])
    return [coco_ap(ds.file, r, image_ids=ds.ids) for r in results]

def same_numbers(ap, printed):
    for name,key in [('AP', 'AP'), ('Ap .5', 'AP50'), ('AP .75', 'AP75'), ('AP (M)', 'APm'), ('AP (L)', 'APl'), ('AR', 'AR')]:
        assert abs(ap[key] - printed['stats'][name]) < 1e-3, name

def test_oracle_golden(annotated, oracle_json):
    "The original's numbers with its solver; the default solver is not below them on the same maps"
    munkres,unrefined,ours = oracle_aps(annotated, [dict(solver='munkres'), dict(solver='munkres', refine=False), {}])
    same_numbers(munkres, oracle_json['default'])
    same_numbers(unrefined, oracle_json['no_refine'])
    assert ours['AP'] >= munkres['AP']

def test_oracle_golden_without_mirror(annotated, oracle_json):
    munkres,ours = oracle_aps(annotated, [dict(solver='munkres'), {}], flip=False)
    same_numbers(munkres, oracle_json['no_flip'])
    assert ours['AP'] >= munkres['AP']

def test_oracle_golden_of_scales(annotated, oracle_json):
    same_numbers(*oracle_aps(annotated, [dict(solver='munkres')], scales=(.5, 1, 2)), oracle_json['multi_scale'])

def test_oracle_unbiased(annotated):
    "What makes it: coordinates, and refine taking near tags only"
    ours,any_tag = oracle_aps(annotated, [{}, dict(refine_threshold=np.inf)], 'unbiased')
    assert ours['AP'] >= .985
    assert ours['AP'] > any_tag['AP'] + .01

def test_oracle_results_of_the_sample(synth):
    ds = PoseDataset(*find_coco(synth, 'val2017'), train=False)
    results = oracle_results(ds, 256, 'unbiased')
    assert coco_ap(ds.file, results) == oracle_aps(ds, [{}], 'unbiased', size=256)[0]
    assert coco_ap(ds.file, results)['AP'] > .85

# ---- what must hold for any image

black = np.zeros((64, 64, 3), np.uint8)

def skeleton(n, pairs=()): return Skeleton([f'joint{i}' for i in range(n)], pairs, [], [.05]*n)

class Drawn(nn.Module):
    "A network that finds a joint wherever a channel of the image is bright; its tags are 1"
    def forward(self, x): # (B, 3, H, W)
        half = lambda x, n: torch.nn.functional.avg_pool2d(x, n)
        heat = ((x - x.amin((2, 3), keepdim=True))/5).clamp(0, 1)
        return [torch.cat([half(heat, 4), torch.ones_like(half(heat, 4))], 1),half(heat, 2)]

def dotted(places, width, height, sigma=5.):
    "A black image with a dot of each colour"
    image = np.zeros((height, width, 3), np.float32)
    for c,(x,y) in enumerate(places):
        ys,xs = np.mgrid[:height, :width]
        image[..., c] = 255*np.exp(-((xs-x)**2 + (ys-y)**2)/(2*sigma**2))
    return image.round().astype(np.uint8)

@given(st.integers(60, 150), st.integers(60, 150), st.integers(0, 9999), st.sampled_from(['original', 'unbiased']), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_any_size_comes_back(width, height, seed, convention, flip, project2image):
    "A dot of each colour is found where it is, whatever the size of image and network; with the unbiased convention to a fraction of a pixel"
    rng = np.random.default_rng(seed)
    places = rng.uniform(15, [width-15, height-15], (3, 2))
    predictor = Predictor(Drawn(), skeleton(3), size=int(rng.choice([64, 96, 160])), flip=flip, convention=convention, project2image=project2image)
    people = predictor(dotted(places, width, height))
    assert len(people) == 1 and people.keypoints.shape == (1, 3, 3) and people.tags.shape == (1, 3, 1 + flip)
    off = np.abs(people.keypoints[0, :, :2] - places).max()
    assert off < (.35 if convention == 'unbiased' else 4)

@given(st.integers(60, 150), st.integers(60, 150), st.integers(0, 9999))
@settings(max_examples=15, deadline=None)
def test_mirrored_image(width, height, seed):
    "The mirrored image has the mirrored people: x becomes size - 1 - x"
    image = dotted(np.random.default_rng(seed).uniform(12, [width-12, height-12], (3, 2)), width, height)
    predictor = Predictor(Drawn(), skeleton(3), size=96, convention='unbiased')
    here,there = predictor(image),predictor(np.ascontiguousarray(image[:, ::-1]))
    assert len(here) == len(there) == 1
    np.testing.assert_allclose(here.scores, there.scores, atol=1e-3)
    np.testing.assert_allclose(here.keypoints[..., 0], width - 1 - there.keypoints[..., 0], atol=.1)
    np.testing.assert_allclose(here.keypoints[..., 1], there.keypoints[..., 1], atol=.1)

def test_unmirror_is_its_own_inverse():
    maps = torch.randn(17, 6, 8)
    torch.testing.assert_close(unmirror(unmirror(maps, COCO.flip_index), COCO.flip_index), maps)
    torch.testing.assert_close(unmirror(maps[:1], COCO.flip_index), maps[:1].flip(2))

@given(st.integers(1, 4), st.sampled_from([1, 5, 17, 23]), st.integers(0, 9999), st.sampled_from(['original', 'unbiased']), st.booleans())
@settings(max_examples=25, deadline=None)
def test_oracle_finds_any_skeleton(n_people, n_joints, seed, convention, flip):
    "People far apart come back where they are, any number of joints, some of them pairs"
    rng = np.random.default_rng(seed)
    bodies = skeleton(n_joints, [(i, i+1) for i in range(0, n_joints-1, 2)])
    centre = np.array([(50, 50), (150, 50), (50, 150), (150, 150)])[:n_people, None] + [20, 0]
    joints = np.concatenate([centre + rng.uniform(-25, 25, (n_people, n_joints, 2)), np.ones((n_people, n_joints, 1))], -1)
    predictor = Predictor(Oracle(bodies, convention).look(joints, (240, 200)), bodies, size=256, flip=flip, convention=convention)
    people = predictor(np.zeros((200, 240, 3), np.uint8))
    assert len(people) == n_people
    who = [np.abs(joints[:, 0, :2] - pose[0, :2]).sum(1).argmin() for pose in people.keypoints]
    assert np.abs(people.keypoints[..., :2] - joints[who][..., :2]).max() < (.05 if convention == 'unbiased' else 2)

def test_nobody():
    for convention in ('original', 'unbiased'):
        predictor = Predictor(Oracle(convention=convention).look([], (120, 90)), size=64, convention=convention)
        people = predictor(np.zeros((90, 120, 3), np.uint8))
        assert len(people) == 0 and people.keypoints.shape == (0, 17, 3) and people.tags.shape == (0, 17, 2)
        assert to_results(people, 1) == [] and repr(people) == 'People(0: scores )'

def test_image_of_one_colour_or_one_pixel():
    torch.manual_seed(0)
    predictor = Predictor(higher_hrnet('tiny'), size=64)
    for image in (np.zeros((80, 90, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8), np.full((1, 1, 3), 7, np.uint8), np.zeros((2, 9, 3), np.uint8)):
        assert predictor(image).keypoints.shape[1:] == (17, 3)

# ---- batches

@pytest.fixture(scope='module')
def tiny():
    torch.manual_seed(0)
    return higher_hrnet('tiny')

class Images:
    "Enough of a dataset for `predict_dataset`"
    category = {'id': 7}
    def __init__(self, sizes): self.images = [np.random.default_rng(i).integers(0, 256, (h, w, 3), np.uint8) for i,(w,h) in enumerate(sizes)]
    def __len__(self): return len(self.images)
    def image(self, i): return self.images[i]
    def info(self, i): return {'id': 100 - i}

@pytest.mark.parametrize('settings', [{}, dict(flip=False), dict(scales=(.5, 1)), dict(project2image=False, convention='unbiased')])
def test_maps_of_a_batch_are_those_of_its_images(tiny, settings):
    "Images of other sizes, one size in the network"
    images = Images([(90, 64), (91, 65), (90, 64)]).images
    predictor = Predictor(tiny, size=64, **settings)
    for image,(heat,tags) in zip(images, predictor.batch_maps(images)):
        heat_alone,tags_alone = predictor.maps(image)
        torch.testing.assert_close(heat, heat_alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tags.whole(), tags_alone, rtol=1e-4, atol=1e-5)

@pytest.mark.parametrize('bs', [None, 2, 3, 100])
def test_dataset_in_batches(bs):
    "Each image's people with its id, in the order of the dataset, in batches of one size"
    data = Images([(90, 64), (64, 64), (90, 64), (64, 100), (91, 64), (64, 64), (64, 64)])
    rng = np.random.default_rng(0)
    data.images = [dotted(rng.uniform(15, [i.shape[1]-15, i.shape[0]-15], (3, 2)), i.shape[1], i.shape[0]) for i in data.images]
    predictor,sizes = Predictor(Drawn(), skeleton(3), size=64),[]
    predictor.model.register_forward_pre_hook(lambda model, args: sizes.append(len(args[0])//2))
    want = [r for i in range(len(data)) for r in to_results(predictor(data.image(i)), data.info(i)['id'], 7)]
    sizes.clear()
    assert predict_dataset(predictor, data, progress=False, bs=bs) == want
    assert [r['image_id'] for r in want] == list(range(100, 93, -1))
    assert sorted(sizes) == {None: [1]*7, 2: [1, 1, 1, 2, 2], 3: [1, 3, 3], 100: [1, 3, 3]}[bs]

def test_modes_come_back(tiny):
    tiny.train()
    tiny.stage2.eval()
    before = {k: v.clone() for k,v in tiny.state_dict().items()}
    Predictor(tiny, size=64)(np.zeros((64, 64, 3), np.uint8))
    assert tiny.training and not tiny.stage2.training
    for k,v in tiny.state_dict().items(): assert torch.equal(v, before[k])

def test_modes_come_back_after_an_error(tiny):
    tiny.train()
    handle = tiny.register_forward_hook(lambda *_: 1/0)
    with pytest.raises(ZeroDivisionError): Predictor(tiny, size=64)(black)
    handle.remove()
    assert tiny.training and torch.is_grad_enabled()

# ---- bad input

@pytest.mark.parametrize('where,bad', [('conv1.weight', np.nan), ('final_layers.0.bias', np.nan), ('final_layers.0.bias', -np.inf)])
def test_bad_weights(where, bad):
    model = higher_hrnet('tiny')
    with torch.no_grad(): model.get_parameter(where).view(-1)[0] = bad
    with pytest.raises(ValueError, match=f'weights, {where} first: load others'): Predictor(model, size=64)(black)

def test_large_maps_are_no_error():
    class Large(Drawn):
        def forward(self, x): return [3e38*torch.ones(1, 34, 16, 16), torch.ones(1, 17, 32, 32)]
    heat,_ = Predictor(Large(), size=64, flip=False).maps(black)
    assert heat.shape == (17, 64, 64)

@pytest.mark.parametrize('image,message', [
    (np.zeros((64, 64, 3)), r'uint8 RGB is needed, got \(64, 64, 3\) float64'), (np.zeros((64, 64), np.uint8), r'got \(64, 64\)'),
    (np.zeros((64, 64, 4), np.uint8), r'got \(64, 64, 4\)'), (np.zeros((3, 64, 64), np.uint8), r'got \(3, 64, 64\)'),
    (np.zeros((0, 64, 3), np.uint8), r'got \(0, 64, 3\)'), (None, 'image: .* is needed')])
def test_no_image(image, message):
    with pytest.raises(ValueError, match=message): Predictor(Drawn(), skeleton(3), size=64)(image)

def test_unreadable_files(tmp_path):
    predictor = Predictor(Drawn(), skeleton(3), size=64)
    (tmp_path/'broken.jpg').write_bytes(b'no picture')
    for name in ('broken.jpg', 'nobody.jpg'):
        for path in (tmp_path/name, str(tmp_path/name)):
            with pytest.raises(OSError, match=name): predictor(path)

def test_unreadable_image_of_a_dataset(tmp_path, synth):
    "No score for the rest of a dataset"
    ds = PoseDataset(*find_coco(synth, 'val2017'), train=False)
    ds.folder = tmp_path
    with pytest.raises(OSError, match=ds.info(0)['file_name']): predict_dataset(Predictor(Oracle(), size=64), ds, progress=False)

@pytest.mark.parametrize('settings,message', [
    (dict(size=100), 'size: a multiple of 32 is needed, got 100'), (dict(size=0), 'size'), (dict(size=-64), 'size'), (dict(scales=()), 'scales: positive'),
    (dict(scales=(1, -1)), 'scales: positive'), (dict(scales=(.5, 2)), 'scale 1.* must be among them'), (dict(convention='udp'), "convention: .* got 'udp'"),
    (dict(detection_threshold=-1), 'detection_threshold: 0 or more'), (dict(max_people=0), 'max_people: 1 or more'), (dict(nms_kernel=4), 'nms kernel: an odd'),
    (dict(solver='lap'), "solver: .* got 'lap'")])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message): Predictor(Drawn(), skeleton(3), **settings)

def test_unknown_setting():
    with pytest.raises(TypeError, match="no argument 'tag_treshold'"): Predictor(Drawn(), tag_treshold=1)

@pytest.mark.parametrize('n', [14, 18, 40])
@pytest.mark.parametrize('flip', [True, False])
def test_joints_that_do_not_fit(tiny, n, flip):
    "A network of 17 joints, and a skeleton of another number"
    with pytest.raises(ValueError, match=rf'\[34, 17\] maps.* for {n} joints.*skeleton'): Predictor(tiny, skeleton(n), size=64, flip=flip)(black)

def test_kept_centre(tiny):
    "17 maps are 16 joints and the centre, which is left out"
    assert Predictor(tiny, skeleton(16), size=64, with_center=True)(black).keypoints.shape[1] == 16

def test_batches_that_do_not_fit():
    predictor = Predictor(Drawn(), skeleton(3), size=64)
    with pytest.raises(ValueError, match='an empty list'): predictor.batch([])
    with pytest.raises(ValueError, match='the same size in the network'): predictor.batch([black, np.zeros((64, 90, 3), np.uint8)])
    with pytest.raises(ValueError, match='bs: 1 or more'): predict_dataset(predictor, Images([(64, 64)]), progress=False, bs=0)

@pytest.mark.parametrize('convention', ['original', 'unbiased'])
@pytest.mark.parametrize('size', [(544, 320), (320, 192), (224, 128)])
def test_inputs_of_all_scales_show_the_same(convention, size):
    "A spot lies at the same share of the width and of the height, however the sizes were rounded"
    image,base = np.zeros((480, 640, 3), np.uint8),(448, 256)
    image[200:240, 400:440] = 255
    half = .5 if convention == 'unbiased' else 0
    def spot(x, size):
        weight = x[0] - x[0].min()
        return [((weight*torch.arange(n).view(shape)).sum()/weight.sum() + half)/n for n,shape in zip(size, ((1, -1), (-1, 1)))]
    np.testing.assert_allclose(spot(network_input(image, size, convention, base), size), spot(network_input(image, base, convention), base), atol=2e-3)

@pytest.mark.parametrize('scales', [(1.25, 1, .75), (.3, 1), (1, 1.1)])
def test_any_scale(tiny, scales):
    predictor = Predictor(tiny, size=64, scales=scales)
    assert all(n % 32 == 0 and n for size in predictor.input_sizes(np.zeros((73, 51, 3))) for n in size)
    predictor(np.zeros((73, 51, 3), np.uint8))

@pytest.mark.parametrize('project2image', [True, False])
@pytest.mark.parametrize('scales', [(1,), (.5, 1, 2), (1.25, 1, .75)])
@pytest.mark.parametrize('width,height', [(640, 480), (427, 640)])
def test_places_at_any_scale(width, height, scales, project2image):
    "Dots are found where they are, whatever sizes were rounded on the way"
    dots = np.array([[40, 40], [width-40, 60], [width/2, height-40]])
    image = dotted(dots, width, height, sigma=9)
    people = Predictor(Drawn(), skeleton(3), size=256, scales=scales, project2image=project2image, convention='unbiased')(image)
    np.testing.assert_allclose(people.keypoints[people.scores.argmax(), :, :2], dots, atol=1)

@pytest.mark.parametrize('heat,tags', [((True, False), (True, True)), ((False, True), (True, True)), ((False, True), (True, False)), ((True, True), (True, False))])
def test_heatmaps_of_some_outputs(heat, tags):
    "The heatmap is the mean of the outputs that have one; nothing else is taken for it"
    torch.manual_seed(0)
    model = higher_hrnet('tiny', heatmap_stages=heat, ae_stages=tags)
    n_heat = [17*h for h in heat]
    with torch.no_grad():
        for layer,n in zip(model.final_layers, n_heat): layer.weight.zero_(), layer.bias[:n].fill_(.2), layer.bias[n:].fill_(3)
    for net,settings in ((model, {}), (nn.Sequential(model), dict(heatmap_stages=heat))):
        heat_map,tag_map = Predictor(net, size=64, **settings).maps(black)
        assert torch.allclose(heat_map, torch.tensor(.2)) and torch.allclose(tag_map, torch.tensor(3.)) and tag_map.shape[-1] == 2*sum(tags)

def test_network_in_bfloat16():
    "A network whose weights are bfloat16 gets its input so, and finds the same"
    torch.manual_seed(0)
    model = higher_hrnet('tiny').eval()
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    want,found = (Predictor(net, size=64).maps(image)[0] for net in (model, fuse_bn(model).bfloat16()))
    assert found.dtype == torch.float32 and (found - want).abs().max() < .05*want.abs().max()

class Everywhere(Drawn):
    "A joint of everybody at each eighth pixel, also beyond the image"
    def forward(self, x):
        B,_,H,W = x.shape
        heat = torch.zeros(B, 17, H//2, W//2)
        heat[:, :, 4::8, 4::8] = .8
        return [torch.cat([torch.nn.functional.avg_pool2d(heat, 2)*4, torch.zeros(B, 17, H//4, W//4)], 1), heat]

@pytest.mark.parametrize('project2image', [True, False])
@pytest.mark.parametrize('width,height', [(100, 64), (64, 100), (70, 64)])
def test_nobody_beyond_the_image(width, height, project2image):
    "The input is 128 pixels long and shows black at both ends of the image; the original looks there too"
    image = np.zeros((height, width, 3), np.uint8)
    def places(convention):
        people = Predictor(Everywhere(), size=64, convention=convention, project2image=project2image, flip=False)(image)
        return people.keypoints[people.keypoints[..., 2] > 0][:, :2]
    inside = lambda xy: ((xy > -2) & (xy < np.array([width, height]) + 1)).all()
    assert len(places('unbiased')) and inside(places('unbiased')) and not inside(places('original'))
