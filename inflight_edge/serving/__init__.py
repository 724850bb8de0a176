"""Serving a fleet: a model repository for NVIDIA Triton Inference Server, and a client with the Detector's interface."""

from inflight_edge.serving.remote import RemoteDetector
from inflight_edge.serving.repository import Form, Queue, Runtime, export_guards, export_repository

__all__ = ["Form", "Queue", "RemoteDetector", "Runtime", "export_guards", "export_repository"]
