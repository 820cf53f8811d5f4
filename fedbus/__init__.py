"""fedbus: federated learning whose server and clients meet only on a message broker.

The names below are loaded when they are first used, so that `import fedbus` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedbus.after_evaluation import AfterEvaluation as AfterEvaluation
    from fedbus.after_evaluation import BestModel as BestModel
    from fedbus.after_evaluation import EarlyStopping as EarlyStopping
    from fedbus.after_evaluation import EvaluatedModel as EvaluatedModel
    from fedbus.after_evaluation import Keep as Keep
    from fedbus.after_evaluation import Stop as Stop
    from fedbus.analytics.local import Columns as Columns
    from fedbus.analytics.result import QueryResult as QueryResult
    from fedbus.analytics.run import query as query
    from fedbus.analytics.run import run_query as run_query
    from fedbus.analytics.statistics import Count as Count
    from fedbus.analytics.statistics import Describe as Describe
    from fedbus.analytics.statistics import Extremes as Extremes
    from fedbus.analytics.statistics import Histogram as Histogram
    from fedbus.analytics.statistics import Mean as Mean
    from fedbus.analytics.statistics import Quantiles as Quantiles
    from fedbus.analytics.statistics import TopValues as TopValues
    from fedbus.analytics.statistics import Variance as Variance
    from fedbus.api import join as join
    from fedbus.api import serve as serve
    from fedbus.api import start_client as start_client
    from fedbus.api import start_server as start_server
    from fedbus.api import start_worker as start_worker
    from fedbus.api import work as work
    from fedbus.app import App as App
    from fedbus.bus.access import Access as Access
    from fedbus.bus.bundle import Bundle as Bundle
    from fedbus.config import Constant as Constant
    from fedbus.config import Cyclic as Cyclic
    from fedbus.config import Hinge as Hinge
    from fedbus.config import Oort as Oort
    from fedbus.config import Polynomial as Polynomial
    from fedbus.config import RoundConfig as RoundConfig
    from fedbus.config import Tiers as Tiers
    from fedbus.config import Uniform as Uniform
    from fedbus.errors import AggregateRefused as AggregateRefused
    from fedbus.errors import FedbusError as FedbusError
    from fedbus.errors import UpdateRefused as UpdateRefused
    from fedbus.server.history import History as History
    from fedbus.simulation.virtual import simulate as simulate
    from fedbus.simulation.virtual_time import VirtualTime as VirtualTime
    from fedbus.strategies.base import ClientUpdate as ClientUpdate
    from fedbus.strategies.base import Strategy as Strategy
    from fedbus.strategies.bulyan import Bulyan as Bulyan
    from fedbus.strategies.clipping import CentredClipping as CentredClipping
    from fedbus.strategies.ditto import Ditto as Ditto
    from fedbus.strategies.fedasync import FedAsync as FedAsync
    from fedbus.strategies.fedavg import FedAvg as FedAvg
    from fedbus.strategies.fedbuff import FedBuff as FedBuff
    from fedbus.strategies.feddyn import FedDyn as FedDyn
    from fedbus.strategies.fednova import FedNova as FedNova
    from fedbus.strategies.fedopt import FedAdagrad as FedAdagrad
    from fedbus.strategies.fedopt import FedAdam as FedAdam
    from fedbus.strategies.fedopt import FedAvgM as FedAvgM
    from fedbus.strategies.fedopt import FedOpt as FedOpt
    from fedbus.strategies.fedopt import FedYogi as FedYogi
    from fedbus.strategies.fedprox import FedProx as FedProx
    from fedbus.strategies.fltrust import FLTrust as FLTrust
    from fedbus.strategies.geometric import GeometricMedian as GeometricMedian
    from fedbus.strategies.krum import Krum as Krum
    from fedbus.strategies.krum import MultiKrum as MultiKrum
    from fedbus.strategies.metrics import mean_and_extremes as mean_and_extremes
    from fedbus.strategies.metrics import quantiles as quantiles
    from fedbus.strategies.metrics import unweighted_mean as unweighted_mean
    from fedbus.strategies.metrics import weighted_mean as weighted_mean
    from fedbus.strategies.norm_bound import NormBound as NormBound
    from fedbus.strategies.optimizers import SGD as SGD
    from fedbus.strategies.optimizers import Adagrad as Adagrad
    from fedbus.strategies.optimizers import Adam as Adam
    from fedbus.strategies.optimizers import Momentum as Momentum
    from fedbus.strategies.optimizers import ServerOptimizer as ServerOptimizer
    from fedbus.strategies.optimizers import Yogi as Yogi
    from fedbus.strategies.order import Median as Median
    from fedbus.strategies.order import TrimmedMean as TrimmedMean
    from fedbus.strategies.qfedavg import QFedAvg as QFedAvg
    from fedbus.strategies.scaffold import Scaffold as Scaffold
    from fedbus.strategies.step import StepStrategy as StepStrategy
    from fedbus.strategies.whole import WholeRound as WholeRound
    from fedbus.strategies.xgboost_bagging import XGBBagging as XGBBagging
    from fedbus.strategies.xgboost_cyclic import XGBCyclic as XGBCyclic
    from fedbus.training.base import Client as Client
    from fedbus.training.base import ClientContext as ClientContext
    from fedbus.training.base import NumPyClient as NumPyClient
    from fedbus.types import EvaluateResult as EvaluateResult
    from fedbus.types import ExtraSpec as ExtraSpec
    from fedbus.types import FitResult as FitResult

_HOMES = {
    "Access": "bus.access",
    "Adagrad": "strategies.optimizers",
    "Adam": "strategies.optimizers",
    "AfterEvaluation": "after_evaluation",
    "AggregateRefused": "errors",
    "App": "app",
    "BestModel": "after_evaluation",
    "Bulyan": "strategies.bulyan",
    "Bundle": "bus.bundle",
    "CentredClipping": "strategies.clipping",
    "Client": "training.base",
    "ClientContext": "training.base",
    "ClientUpdate": "strategies.base",
    "Columns": "analytics.local",
    "Constant": "config",
    "Count": "analytics.statistics",
    "Cyclic": "config",
    "Describe": "analytics.statistics",
    "Ditto": "strategies.ditto",
    "EarlyStopping": "after_evaluation",
    "EvaluatedModel": "after_evaluation",
    "EvaluateResult": "types",
    "ExtraSpec": "types",
    "Extremes": "analytics.statistics",
    "FedAdagrad": "strategies.fedopt",
    "FedAdam": "strategies.fedopt",
    "FedAsync": "strategies.fedasync",
    "FedAvg": "strategies.fedavg",
    "FedAvgM": "strategies.fedopt",
    "FedBuff": "strategies.fedbuff",
    "FedbusError": "errors",
    "FedDyn": "strategies.feddyn",
    "FedNova": "strategies.fednova",
    "FedOpt": "strategies.fedopt",
    "FedProx": "strategies.fedprox",
    "FedYogi": "strategies.fedopt",
    "FitResult": "types",
    "FLTrust": "strategies.fltrust",
    "GeometricMedian": "strategies.geometric",
    "Hinge": "config",
    "Histogram": "analytics.statistics",
    "History": "server.history",
    "join": "api",
    "Keep": "after_evaluation",
    "Krum": "strategies.krum",
    "Mean": "analytics.statistics",
    "mean_and_extremes": "strategies.metrics",
    "Median": "strategies.order",
    "Momentum": "strategies.optimizers",
    "MultiKrum": "strategies.krum",
    "NormBound": "strategies.norm_bound",
    "NumPyClient": "training.base",
    "Oort": "config",
    "Polynomial": "config",
    "QFedAvg": "strategies.qfedavg",
    "Quantiles": "analytics.statistics",
    "quantiles": "strategies.metrics",
    "query": "analytics.run",
    "QueryResult": "analytics.result",
    "RoundConfig": "config",
    "run_query": "analytics.run",
    "Scaffold": "strategies.scaffold",
    "serve": "api",
    "ServerOptimizer": "strategies.optimizers",
    "SGD": "strategies.optimizers",
    "simulate": "simulation.virtual",
    "start_client": "api",
    "start_server": "api",
    "start_worker": "api",
    "StepStrategy": "strategies.step",
    "Stop": "after_evaluation",
    "Strategy": "strategies.base",
    "Tiers": "config",
    "TopValues": "analytics.statistics",
    "TrimmedMean": "strategies.order",
    "Uniform": "config",
    "unweighted_mean": "strategies.metrics",
    "UpdateRefused": "errors",
    "Variance": "analytics.statistics",
    "VirtualTime": "simulation.virtual_time",
    "weighted_mean": "strategies.metrics",
    "WholeRound": "strategies.whole",
    "work": "api",
    "XGBBagging": "strategies.xgboost_bagging",
    "XGBCyclic": "strategies.xgboost_cyclic",
    "Yogi": "strategies.optimizers",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedbus' has no attribute {name!r}")
    return getattr(import_module(f"fedbus.{_HOMES[name]}"), name)
