"""What pyproject.toml cannot say: `kernels/` is installed as the subpackage `spikedecoder.kernels`."""

from setuptools import find_packages, setup

KERNELS = "spikedecoder.kernels"

setup(
    packages=[
        *find_packages(include=["spikedecoder", "spikedecoder.*"]),
        KERNELS,
        *(f"{KERNELS}.{name}" for name in find_packages("kernels")),
    ],
    package_dir={KERNELS: "kernels"},
    package_data={"spikedecoder": ["py.typed"]},
    zip_safe=False,
)
