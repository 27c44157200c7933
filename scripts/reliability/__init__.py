"""What tvlens does when things go wrong: damaged files, kills, Ctrl-C, full disks, two at once.

make reliability
PYTHONPATH=scripts:tests python -m reliability --kills 20 --inputs 1000
PYTHONPATH=scripts:tests python -m reliability --only template:123    # one input again
"""
