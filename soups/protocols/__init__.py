"""Protocols: many training runs by plan, and the averages of their weights."""

from soups.protocols.execution import Notes as Notes
from soups.protocols.execution import Operation as Operation
from soups.protocols.execution import Output as Output
from soups.protocols.execution import Work as Work
from soups.protocols.execution import execute as execute
from soups.protocols.execution import in_sequence as in_sequence
from soups.protocols.execution import notes_of as notes_of
from soups.protocols.execution import perform as perform
from soups.protocols.plan import Node as Node
from soups.protocols.plan import Parameters as Parameters
from soups.protocols.plan import Plan as Plan
from soups.protocols.runner import FittingConfiguration as FittingConfiguration
from soups.protocols.runner import ProtocolConfiguration as ProtocolConfiguration
from soups.protocols.runner import ProtocolRunner as ProtocolRunner
from soups.protocols.runner import build_protocol as build_protocol
