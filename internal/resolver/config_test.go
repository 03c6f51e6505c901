package resolver

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
)

func TestReadConfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "resolv.conf")
	for text, want := range map[string]string{
		"nameserver 192.0.2.1\nnameserver ::ffff:192.0.2.2\nnameserver fe80::1%eth0\nnameserver nonsense\nsearch a.example. b\n": "[192.0.2.1:53 192.0.2.2:53 [fe80::1%eth0]:53] [a.example b]",
		"# nothing\n": "[127.0.0.1:53] []",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		up, search, err := ReadConfig(file)
		if got := fmt.Sprint(up, search); err != nil || got != want {
			t.Errorf("%q: %s, %v, want %s", text, got, err, want)
		}
	}
	if _, _, err := ReadConfig(file + ".none"); err == nil {
		t.Error("a file that is not there")
	}
}
