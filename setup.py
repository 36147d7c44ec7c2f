"""Install course_ml. All that is said here comes from settings.ini, which nbdev reads too."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
reader = ConfigParser(delimiters=["="], interpolation=None)
reader.read(here / "settings.ini", encoding="utf-8")
settings = reader["DEFAULT"]
extras = {name: settings[f"{name}_requirements"].split()
          for name in ("keras", "kaggle", "heif", "pdf", "rembg", "cluster", "jupyter", "dev")}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    author=settings["author"],
    keywords=settings["keywords"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: " + settings["audience"],
        "Natural Language :: " + settings["language"],
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    packages=find_packages(include=["course_ml", "course_ml.*"]),
    package_data={"course_ml": ["weights/*", "templates/*"]},
    include_package_data=False,
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)
