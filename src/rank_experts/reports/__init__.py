"""Recording what routers decide, and saying it: statistics, findings, tables, charts, the page."""

from .recording import RoutingStatistics, record_routing
from .report import RoutingReport, inspect_adapter, routing_report

__all__ = ["RoutingReport", "RoutingStatistics", "inspect_adapter", "record_routing", "routing_report"]
