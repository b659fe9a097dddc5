"""All that is read and checked before a plan is made."""
