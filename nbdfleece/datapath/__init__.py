"""The hot room: mechanism without policy, flat where that pays.

(The essay on the life of one request, with figures, stands here once measured.)
"""
