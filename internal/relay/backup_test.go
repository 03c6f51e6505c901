package relay

import (
	"database/sql"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A copy is of what is there, as it is, and nobody else's to read.
func TestBackup(t *testing.T) {
	dir := t.TempDir()
	to := filepath.Join(dir, "copy.db")
	for name, source := range map[string]string{"nothing there": filepath.Join(dir, "none.db"), "no server there": "postgres://nobody@127.0.0.1:1/relay"} {
		err := Backup(t.Context(), dir, source, to)
		if _, there := os.Stat(to); err == nil || there == nil {
			t.Errorf("%s: %v, %v", name, err, there)
		}
		if _, made := os.Stat(source); made == nil {
			t.Errorf("%s: it was made", name)
		}
		if strings.HasPrefix(source, "postgres") && !strings.Contains(err.Error(), "pg_dump") {
			t.Error(err)
		}
	}
	db, err := sql.Open("sqlite", filepath.Join(dir, database)) // of an older relay
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if _, err := db.Exec("CREATE TABLE old (x TEXT); INSERT INTO old VALUES ('y')"); err != nil {
		t.Fatal(err)
	}
	if err := Backup(t.Context(), dir, "", to); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(to); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v %v", info, err)
	}
	var tables int
	if err := db.QueryRow("SELECT COUNT(*) FROM sqlite_master").Scan(&tables); err != nil || tables != 1 {
		t.Errorf("%d tables, %v: it was brought up to date", tables, err)
	}
	copied, err := sql.Open("sqlite", to)
	if err != nil {
		t.Fatal(err)
	}
	defer copied.Close()
	var x string
	if err := copied.QueryRow("SELECT x FROM old").Scan(&x); err != nil || x != "y" {
		t.Errorf("%q %v", x, err)
	}
	if err := Backup(t.Context(), dir, "", to); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over a file that is there: %v", err)
	}
}
