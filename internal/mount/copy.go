package mount

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/pkg/sftp"
)

// copyMark is a file that says that a directory holds a copy of ours: the next one may take its place.
const copyMark = ".doppel-copy"

// isCopy says whether a directory of these names is a copy.
func isCopy(names []fs.DirEntry) bool {
	return slices.ContainsFunc(names, func(e fs.DirEntry) bool { return e.Name() == copyMark && e.Type().IsRegular() })
}

// clean removes a copy; the mark goes last, so that what is broken off can be done again.
func clean(point string, names []fs.DirEntry) error {
	root, err := os.OpenRoot(point)
	if err != nil {
		return err
	}
	defer root.Close()
	for _, e := range names {
		if e.Name() != copyMark {
			if err := root.RemoveAll(e.Name()); err != nil {
				return fmt.Errorf("remove the earlier copy: %w", err)
			}
		}
	}
	return root.Remove(copyMark)
}

const (
	// maxCopied bounds the files and directories of a copy.
	maxCopied = 1_000_000
	// maxDepth bounds how deep its directories are.
	maxDepth = 100
)

// LeftOutError says that files could not be read, or were too many: all else is copied.
type LeftOutError struct {
	Files int
	Path  string // the first of them
	Err   error
}

func (e *LeftOutError) Error() string {
	return fmt.Sprintf("%d not copied, the first of them %s: %v", e.Files, e.Path, e.Err)
}

func (e *LeftOutError) Unwrap() error { return e.Err }

// Copy copies all files, as they are now, to cfg.Point instead of mounting them there. What cannot be read, or is beyond
// maxCopied or maxDepth, is left out: LeftOutError.
func Copy(ctx context.Context, cfg Config) error {
	stream, err := cfg.Dial(ctx)
	if err != nil {
		return fmt.Errorf("reach the file server: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = stream.Close() })
	defer stop()
	c, err := sftp.NewClientPipe(&checked{Reader: stream}, stream, sftp.MaxPacketUnchecked(maxData), sftp.UseConcurrentReads(true))
	if err != nil {
		return fmt.Errorf("reach the file server: %w", err)
	}
	defer c.Close()
	// Below a root, so that a link that was copied cannot lead out while something is written through it.
	root, err := os.OpenRoot(cfg.Point)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.WriteFile(copyMark, []byte("A copy of volumes of "+cfg.Source+", made by doppel. The next one takes its place, with all that is here.\n"), 0o600); err != nil {
		return err
	}
	t := tree{ctx: ctx, c: c, root: root, point: cfg.Point, most: maxCopied}
	if err := t.copy("/", 0); err != nil {
		return err
	}
	left := t.left
	if left.Err != nil {
		return &left
	}
	return nil
}

// tree is one copy.
type tree struct {
	ctx   context.Context
	c     *sftp.Client
	root  *os.Root
	point string
	most  int // files and directories yet
	pages int // that the lists of the directories have in which the copy is, beyond leastPages of each
	left  LeftOutError
}

// copy copies what is in a directory, as far as the server lets it.
func (t *tree) copy(dir string, depth int) error {
	fis, n, err := readDir(t.ctx, t.c, dir, leastPages+max(0, maxPages-t.pages), nil)
	if err := t.note(dir, err); err != nil {
		return err
	}
	t.pages += max(0, n-leastPages)
	defer func() { t.pages -= max(0, n-leastPages) }()
	for _, fi := range fis {
		switch fi.Name() {
		case ".", "..", "/": // what no directory has
			continue
		}
		name := path.Join(dir, fi.Name())
		if t.most == 0 {
			t.leave(name, fmt.Errorf("a copy has at most %d files and directories", maxCopied))
			continue
		}
		if fi.IsDir() && depth == maxDepth {
			t.leave(name, fmt.Errorf("a copy is at most %d directories deep", maxDepth))
			continue
		}
		t.most--
		err := copyOne(t.c, t.root, t.point, name, fi)
		if err == nil && fi.IsDir() {
			err = t.copy(name, depth+1)
		} else {
			err = t.note(name, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// note has what the server refuses left out, and returns what concerns all that follows.
func (t *tree) note(name string, err error) error {
	switch {
	case err == nil:
		return nil
	case t.ctx.Err() != nil:
		return context.Cause(t.ctx)
	case !isAnswer(err):
		return fmt.Errorf("copy %s: %w", name, err)
	}
	t.leave(name, toErrno(err))
	return nil
}

func (t *tree) leave(name string, err error) {
	if t.left.Files++; t.left.Err == nil {
		t.left.Path, t.left.Err = name, err
	}
}

func copyOne(c *sftp.Client, root *os.Root, point, name string, fi fs.FileInfo) error {
	rel := filepath.FromSlash(name[1:])
	switch {
	case fi.IsDir():
		err := root.Mkdir(rel, 0o700)
		if errors.Is(err, fs.ErrExist) {
			err = nil
		}
		return err
	case fi.Mode().Type() == fs.ModeSymlink:
		to, err := c.ReadLink(name)
		if err != nil {
			return err
		}
		return root.Symlink(confine(point, name, to), rel)
	case fi.Mode().IsRegular():
		in, err := something(c.Open(name))
		if err != nil {
			return err
		}
		defer in.Close()
		out, err := root.OpenFile(rel, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fi.Mode().Perm()&0o700|0o600)
		if err != nil {
			return err
		}
		if _, err = in.WriteTo(out); err != nil {
			return errors.Join(err, out.Close(), root.Remove(rel)) // rather none than half of it
		}
		return out.Close()
	}
	return nil // sockets and the like mean nothing here
}

// isAnswer says whether err is what the server answered for one file. All else, as a full disk here, concerns the others too.
func isAnswer(err error) bool {
	var here *fs.PathError
	var answer *sftp.StatusError
	return !errors.As(err, &here) && (errors.As(err, &answer) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) ||
		errors.Is(err, syscall.EFBIG))
}
