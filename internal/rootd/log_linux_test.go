package rootd

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestOpenLogAsUser has the log opened with the user's rights: what the user may not write, doppel-rootd does not either.
func TestOpenLogAsUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to drop rights")
	}
	const uid = 4242
	base := t.TempDir()
	for d := base; d != "/" && d != os.TempDir(); d = filepath.Dir(d) {
		if err := os.Chmod(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	own := filepath.Join(base, "own")
	if err := os.Mkdir(own, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(own, uid, -1); err != nil {
		t.Fatal(err)
	}
	secret := filepath.Join(base, "secret")
	if err := os.WriteFile(secret, []byte("root's"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(base, filepath.Join(own, "way")); err != nil {
		t.Fatal(err)
	}

	f, err := OpenLog(filepath.Join(own, "rootd.log"), uid)
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Uid != uid {
		t.Errorf("the log belongs to %d (%v), want %d", st.Uid, err, uid)
	}
	f.Close()
	for _, path := range []string{secret, filepath.Join(own, "way", "secret"), filepath.Join(own, "way", "new"), filepath.Join(base, "new")} {
		if f, err := OpenLog(path, uid); !errors.Is(err, fs.ErrPermission) {
			f.Close()
			t.Errorf("%s: %v, want a refusal", path, err)
		}
	}
	if f, err := os.OpenFile(secret, os.O_WRONLY, 0); err != nil { // this goroutine's rights are untouched
		t.Error(err)
	} else {
		f.Close()
	}
}
