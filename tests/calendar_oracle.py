"""Answers questions about recurrence rules and holidays, one JSON line each, from `dateutil` and `holidays`."""

import json
import sys
from datetime import datetime

import holidays
from dateutil.rrule import rrulestr

for line in sys.stdin:
    question = json.loads(line)
    if "rule" in question:
        rule = rrulestr(question["rule"], dtstart=datetime.fromisoformat(question["start"]))
        found = rule.between(datetime(2019, 12, 31), datetime(2036, 1, 1))
        days = [day.date().isoformat() for day in found]
    else:
        known = holidays.country_holidays(question["country"], subdiv=question["region"], years=range(2020, 2036))
        days = sorted(day.isoformat() for day in known if day.weekday() < 5 and 2020 <= day.year < 2036)
    print(json.dumps(days), flush=True)
