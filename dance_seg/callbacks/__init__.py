"""Hooks around the training step; each fetches, calls a function of the methods, and logs."""

from dance_seg.callbacks.checkpoints import Checkpoints, checkpoint_of
from dance_seg.callbacks.cuts import NetworkCuts
from dance_seg.callbacks.energy import TrainingEnergy
from dance_seg.callbacks.finite import FiniteSteps
from dance_seg.callbacks.image_losses import ImageLosses
from dance_seg.callbacks.ledger import CostLedger, write_cost
from dance_seg.callbacks.pictures import Pictures
from dance_seg.callbacks.plan import PlanInLog
from dance_seg.callbacks.resume import ExactResume
from dance_seg.callbacks.statistics import ReestimatedStatistics
from dance_seg.callbacks.stop import StopOnSignal
from dance_seg.callbacks.watch import Moves

__all__ = [
    "Checkpoints",
    "CostLedger",
    "ExactResume",
    "FiniteSteps",
    "ImageLosses",
    "Moves",
    "NetworkCuts",
    "Pictures",
    "PlanInLog",
    "ReestimatedStatistics",
    "StopOnSignal",
    "TrainingEnergy",
    "checkpoint_of",
    "write_cost",
]
