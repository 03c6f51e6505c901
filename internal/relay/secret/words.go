package secret

import (
	"crypto/rand"
	"math/big"
	"strings"
)

// suffixLen characters of base32 are 65 random bits: nobody finds a preview by guessing, whatever the words are.
const suffixLen = 13

var (
	adjectives = strings.Fields(`amber ample brave brisk calm clear clever cosy crisp daring dusty eager early fair fancy fleet fresh gentle glad golden
		grand happy honest humble jolly keen kind lively lucky mellow merry mild misty neat nimble noble novel polite proud quick quiet rapid ready royal
		rustic shiny silent silver smart snowy solid spry steady sunny swift tidy tranquil vivid warm wise witty young zesty`)
	nouns = strings.Fields(`acorn anchor badger basil beacon birch bison bridge canyon cedar cloud comet coral crane delta ember falcon fern finch fjord
		forest garden glacier harbor hazel heron island ivy jasmine kestrel lagoon lantern lark lemon lily linden lynx maple meadow mesa otter panda
		pebble pepper pine plum poppy quartz raven reef river robin saffron sparrow spruce summit thistle tulip valley walnut willow wren`)
)

// Label returns a new label of a preview's domain: two words for people and 65 random bits.
func Label() string {
	word := func(list []string) string {
		n, err := rand.Int(rand.Reader, big.NewInt(int64(len(list))))
		if err != nil {
			panic(err) // crypto/rand never fails
		}
		return list[n.Int64()]
	}
	return word(adjectives) + "-" + word(nouns) + "-" + strings.ToLower(rand.Text()[:suffixLen])
}
