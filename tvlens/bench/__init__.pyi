from .curves import CurveBenchSettings as CurveBenchSettings
from .curves import bench_curves as bench_curves
from .patching import PatchBenchSettings as PatchBenchSettings
from .patching import bench_patching as bench_patching
from .replay import BenchSettings as BenchSettings
from .replay import bench as bench
from .replay import doubts as doubts
