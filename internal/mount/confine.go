package mount

import (
	"path"
	"slices"
	"strings"
)

// confine returns what a link of the pod says on this machine, where the pod's root is point. Whoever writes in the pod says where a link leads, and
// programs of the laptop follow it, also to write: so it leads nowhere but below point, as in the pod there is nothing above the root. No part of
// the link's own name is a link, so that each ".." at the beginning of what it says is one of its directories. One behind another name, which may
// be a link, takes that name away.
func confine(point, name, to string) string {
	if !slices.Contains(strings.Split(to, "/"), "..") {
		if path.IsAbs(to) {
			return point + to
		}
		return to
	}
	to = path.Clean(to)
	if path.IsAbs(to) {
		return point + to
	}
	rest, up := to, 0
	for ; rest == ".." || strings.HasPrefix(rest, "../"); up++ {
		rest = strings.TrimPrefix(rest[2:], "/")
	}
	depth := strings.Count(path.Clean("/"+name), "/") - 1
	return path.Clean(strings.Repeat("../", min(up, depth)) + rest)
}
