package manager

import (
	"net"
	"testing"

	"github.com/doppel-dev/doppel/internal/mux"
)

// A tunnel whose other end is gone is told from one that somebody wants.
func TestAnswers(t *testing.T) {
	for name, there := range map[string]bool{"there": true, "given up": false} {
		t.Run(name, func(t *testing.T) {
			a, b := net.Pipe()
			s, err := mux.New(a, mux.Config{})
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			if there {
				peer, err := mux.New(b, mux.Config{Initiator: true})
				if err != nil {
					t.Fatal(err)
				}
				defer peer.Close()
			} else {
				_ = b.Close()
			}
			if got := answers(t.Context(), s); got != there {
				t.Errorf("%v, want %v", got, there)
			}
		})
	}
}
