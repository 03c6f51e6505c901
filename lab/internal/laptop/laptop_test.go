package laptop

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestWithUser(t *testing.T) {
	file := filepath.Join(t.TempDir(), "passwd")
	if err := os.WriteFile(file, []byte("root:x:0:0::/:/bin/sh\nother:x:1000:1000::/home/other:/bin/sh\ndev:x:7:7:::\nnobody:x:65534:"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := withUser(file, "dev:*:1000:")
	if err != nil {
		t.Fatal(err)
	}
	if want := "root:x:0:0::/:/bin/sh\nnobody:x:65534:\ndev:*:1000:\n"; got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func TestEnvironment(t *testing.T) {
	got := environment(
		[]string{"HOME=/home/me", "LANG=C", "https_proxy=http://x", "XDG_CONFIG_HOME=/home/me/c", "GOCOVERDIR=/tmp/c"},
		map[string]string{"HOME": "/h", "KUBECONFIG": "/h/.kube/config"},
	)
	if want := []string{"GOCOVERDIR=/tmp/c", "HOME=/h", "KUBECONFIG=/h/.kube/config", "LANG=C"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
