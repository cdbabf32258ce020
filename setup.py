import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

root = Path(__file__).parent
ini = ConfigParser(interpolation=None)
ini.read(root/'settings.ini', encoding='utf-8')
ini = ini['DEFAULT']
version = re.search(r'^__version__ = "([^"]+)"', (root/'posenb/__init__.py').read_text(encoding='utf-8'), re.M).group(1)
# nbdev 3 spells its commands with hyphens: these are the same functions under their nbdev 1 and 2 names
nbdev_commands = dict(test='test:nbdev_test', export='doclinks:nbdev_export', clean='clean:nbdev_clean',
                      install_hooks='clean:nbdev_install_hooks')
setup(
    version=version, description=ini['description'], author=ini['author'], author_email=ini['author_email'],
    license=ini['license'], keywords=ini['keywords'].split(), python_requires='>='+ini['min_python'], packages=['posenb'],
    long_description=(root/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    classifiers=['Programming Language :: Python :: 3', 'Topic :: Scientific/Engineering :: Artificial Intelligence'],
    install_requires=ini['requirements'].split(), extras_require={'dev': ini['dev_requirements'].split()},
    entry_points={'console_scripts': ini['console_scripts'].split() + [f'nbdev_{k}=nbdev.{v}' for k,v in nbdev_commands.items()],
                  'nbdev': ['posenb=posenb._modidx:d']})
