"""The operators: public functions, their registration with torch, and the choice of what runs."""
