"Package facts come from settings.ini; the version from loramix/__init__.py (see pyproject.toml)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here/"settings.ini", encoding="utf-8")
facts = config["DEFAULT"]


def lines(key):
    "The non-empty lines of a multi-line setting."
    return [line.strip() for line in facts.get(key, "").splitlines() if line.strip()]


setup(
    author=facts["author"],
    author_email=facts["author_email"],
    license=facts["license"],
    keywords=facts["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Intended Audience :: Science/Research",
        "Framework :: Jupyter",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["loramix", "loramix.*"]),
    include_package_data=True,
    install_requires=lines("requirements"),
    extras_require={"bench": lines("bench_requirements"), "dev": lines("dev_requirements") + lines("bench_requirements")},
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": ["loramix = loramix._modidx:d"],
    },
)
