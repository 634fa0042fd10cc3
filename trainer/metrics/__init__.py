"""Metrics of samples: each is a function in a file of its own and an entry in METRICS.

A metric gets the statistics of the samples, those of the real images, and the ranks that divide the work, and returns
scores by name and number of images, such as fid2k. A score that is a function is computed in the background, on one
rank.
"""

from collections.abc import Callable, Mapping

from trainer.metrics.fid import fid
from trainer.metrics.inception_score import inception_score
from trainer.metrics.kid import kid
from trainer.metrics.prdc import prdc
from trainer.metrics.statistics import FeatureStatistics, MetricRanks, ReferenceStatistics

Scores = Mapping[str, float | Callable[[], float]]
Metric = Callable[[FeatureStatistics, ReferenceStatistics, MetricRanks], Scores]

METRICS: dict[str, Metric] = {"fid": fid, "is": inception_score, "kid": kid, "prdc": prdc}
OF_SUMS = {"fid", "is"}  # which need no features of single images
