package mount

import (
	"path"
	"strings"
	"testing"
)

func TestConfine(t *testing.T) {
	for _, tt := range []struct{ name, to, want string }{
		{"/data/link", "file", "file"},
		{"/data/link", "..data/key", "..data/key"}, // as the kubelet writes them
		{"/data/link", "/etc/app/key", "/mnt/etc/app/key"},
		{"/data/a/link", "../b", "../b"},
		{"/data/a/link", "../../etc/app", "../../etc/app"},
		{"/data/a/link", "../../../../../home/ada/.ssh", "../../home/ada/.ssh"},
		{"/link", "..", "."},
		{"/link", "../etc", "etc"},
		{"/data/link", "/../../home/ada/.ssh", "/mnt/home/ada/.ssh"},
		{"/data/link", "/etc/../../../home", "/mnt/home"},
		{"/data/a/link", "up/../../../../home", "../../home"}, // up may be a link to the root
		{"/data/link", "up/..", "."},
		{"/data/link", "./../x/./y", "../x/y"},
	} {
		if got := confine("/mnt", tt.name, tt.to); got != tt.want {
			t.Errorf("%s -> %s: %s, want %s", tt.name, tt.to, got, tt.want)
		}
	}
}

// FuzzConfine: no link leads out, whatever is a link on its way.
func FuzzConfine(f *testing.F) {
	f.Add("data/a/link", "../../../x")
	f.Add("data/link", "/../x")
	f.Add("a/b/c", "x/../../../..//./y/..")
	f.Fuzz(func(t *testing.T, name, to string) {
		name = path.Clean("/" + name)
		if name == "/" {
			return
		}
		got := confine("/mnt", name, to)
		if path.IsAbs(got) {
			rest, ok := strings.CutPrefix(got, "/mnt/")
			if !ok || strings.Contains("/"+rest+"/", "/../") {
				t.Errorf("%q -> %q: %q", name, to, got)
			}
			return
		}
		up := 0
		for ; got == ".." || strings.HasPrefix(got, "../"); up++ {
			got = strings.TrimPrefix(got[2:], "/")
		}
		if dirs := strings.Count(name, "/") - 1; up > dirs || strings.Contains("/"+got+"/", "/../") {
			t.Errorf("%q -> %q: %d above, then %q", name, to, up, got)
		}
	})
}
