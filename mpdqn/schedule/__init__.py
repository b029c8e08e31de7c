"""Schedules as tables: the order of actions of every lane, as plain data. Never imports torch."""

from mpdqn.schedule.actions import Action
from mpdqn.schedule.schedules import SCHEDULES, action_table, check_virtual, lane_of_stages
from mpdqn.schedule.tables import ActionTable
from mpdqn.schedule.times import ActionTimes

__all__ = ["SCHEDULES", "Action", "ActionTable", "ActionTimes", "action_table", "check_virtual", "lane_of_stages"]
