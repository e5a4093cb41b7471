"""PILOT's main.py: reads a JSON file of settings."""

import argparse


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", help="JSON file of settings")
    parser.parse_args()
