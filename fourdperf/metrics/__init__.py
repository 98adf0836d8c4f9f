"""How good a reconstruction is: depth, tracks, camera poses and point clouds against the truth.

Every function takes NumPy arrays or tensors, computes in float64 and returns plain floats: means over one clip. The
metric of a benchmark is the mean over its clips. What cannot be computed (no valid point, say) is NaN.
"""

from fourdperf.metrics.depth import depth_metrics
from fourdperf.metrics.points import point_metrics
from fourdperf.metrics.pose import align_poses, pose_metrics
from fourdperf.metrics.tracks import track_metrics

__all__ = ["align_poses", "depth_metrics", "point_metrics", "pose_metrics", "track_metrics"]
