"Where the fixtures lie: small ones in tests/golden, those made of COCO images beside the repository"
from pathlib import Path
import json, os, signal, cv2, numpy as np, pytest, torch

# a shell that starts a job in the background has it ignore Ctrl-C; tests are about what Ctrl-C does
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

def pytest_configure(config):
    "Tests are of the CPU, on every machine; those of a GPU run alone, with `pytest -m gpu`"
    if 'gpu' not in config.option.markexpr.replace('not gpu', ''): os.environ['CUDA_VISIBLE_DEVICES'] = ''

@pytest.fixture(autouse=True)
def a_gpu(request):
    if request.node.get_closest_marker('gpu') and not torch.cuda.is_available(): pytest.skip('needs a GPU')

here = Path(__file__).parent
shared = here.parent.parent/'shared'

@pytest.fixture(scope='session')
def golden():
    "Path of a file printed by the original code; the test is skipped where it is not at hand"
    def find(name):
        for folder in (here/'golden', shared/'golden'):
            if (folder/name).exists(): return folder/name
        pytest.skip(f'{name} is not in tests/golden and {shared}/golden is not there')
    return find

@pytest.fixture(scope='session')
def coco_tiny():
    "109 real COCO images; the test is skipped where they are not at hand"
    path = shared/'coco_tiny'
    if not path.exists(): pytest.skip(f'{path} is not there')
    return path

@pytest.fixture(scope='session')
def synth(): return here.parent/'data'/'synth'

@pytest.fixture
def crowdpose(golden, tmp_path):
    "A folder of blank images with CrowdPose's annotations, which have no area"
    data = json.loads(golden('crowdpose_eval_gt.json').read_text())
    for folder in ('json', 'images'): (tmp_path/folder).mkdir()
    for split in ('trainval', 'test'): (tmp_path/f'json/crowdpose_{split}.json').write_text(json.dumps(data))
    for i in data['images']: cv2.imwrite(str(tmp_path/'images'/i['file_name']), np.zeros((i['height'], i['width'], 3), np.uint8))
    return tmp_path
