"""What a question will cost, before an image is read: FLOPs, memory, seconds, and the budgets that fit a limit."""

from .planner import UHRBatPlan, UHRBatPlanner, plan, planner_of

__all__ = ["UHRBatPlan", "UHRBatPlanner", "plan", "planner_of"]
