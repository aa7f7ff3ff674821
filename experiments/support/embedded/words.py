"""Hand-written word lists, one "key answer" pair an entry, entries parted by commas or line ends.

A key or an answer of several words is written with underscores. Spelling is British. Each pair is a plain, true fact.
"""

PLURAL = """
cat cats, dog dogs, fox foxes, box boxes, bus buses, dish dishes, brush brushes, watch watches, church churches,
glass glasses, dress dresses, class classes, peach peaches, bench benches, beach beaches, branch branches,
wish wishes, baby babies, city cities, lady ladies, story stories, party parties, berry berries, cherry cherries,
puppy puppies, family families, country countries, penny pennies, fairy fairies, army armies, daisy daisies,
pony ponies, lorry lorries, leaf leaves, wolf wolves, knife knives, life lives, wife wives, half halves,
shelf shelves, loaf loaves, thief thieves, calf calves, scarf scarves, elf elves, man men, woman women,
child children, foot feet, tooth teeth, goose geese, mouse mice, ox oxen, person people, sheep sheep, deer deer,
fish fish, potato potatoes, tomato tomatoes, hero heroes, echo echoes, piano pianos, photo photos, radio radios,
book books, tree trees, car cars, house houses, boy boys, girl girls, key keys, monkey monkeys, donkey donkeys,
toy toys, day days, tray trays, turkey turkeys, valley valleys, cup cups, door doors, window windows, table tables,
chair chairs, hat hats, shoe shoes, sock socks, coat coats, apple apples, pear pears, plum plums, lemon lemons,
egg eggs, cake cakes, nut nuts, bean beans, river rivers, lake lakes, hill hills, road roads, bridge bridges,
ship ships, boat boats, train trains, plane planes, bird birds, duck ducks, hen hens, cow cows, pig pigs,
horse horses, goat goats, lion lions, tiger tigers, bear bears, frog frogs, snake snakes, bee bees, ant ants,
spider spiders, king kings, queen queens, farmer farmers, teacher teachers, doctor doctors, star stars,
cloud clouds, flower flowers, garden gardens, school schools, letter letters, song songs, game games, match matches,
fly flies, roof roofs, bush bushes, lunch lunches, inch inches, eyelash eyelashes, mattress mattresses,
witch witches, sandwich sandwiches, butterfly butterflies, lily lilies, library libraries
"""

OPPOSITE = """
hot cold, big small, tall short, fast slow, old young, new second-hand, good bad, happy sad, rich poor, strong weak,
light dark, day night, up down, in out, on off, open closed, full empty, wet dry, clean dirty, hard soft,
loud quiet, high low, near far, early late, first last, left right, true false, yes no, always never,
inside outside, above below, over under, before after, front back, top bottom, begin end, start stop, come go,
give take, buy sell, push pull, win lose, love hate, laugh cry, remember forget, find hide, build destroy,
rise fall, wide narrow, thick thin, deep shallow, heavy weightless, sweet sour, brave cowardly, kind cruel,
polite rude, careful careless, safe dangerous, easy difficult, simple complex, cheap expensive, smooth rough,
sharp blunt, straight crooked, tight loose, alive dead, awake asleep, more less, many few, all none, same different,
north south, east west, winter summer, sunrise sunset, morning evening, friend enemy, question answer, teach learn,
arrive leave, enter exit, appear vanish, attack defend, accept refuse, agree disagree, add subtract,
multiply divide, increase decrease, lead follow, throw catch, float sink, freeze melt, lock unlock, tie untie,
pack unpack, borrow lend, send receive, ask reply, succeed fail, ancient modern, public private, guilty innocent,
male female, hero villain, heaven hell, peace war, victory defeat, profit loss, entrance way_out, ceiling floor,
husband wife, brother sister, father mother, uncle aunt, king queen, prince princess, boy girl, lucky unlucky,
fair unfair, tidy untidy, usual unusual, possible impossible, perfect imperfect, patient impatient,
visible invisible, correct wrong, present absent, rare common, proud humble, lazy hardworking, calm nervous,
noisy silent, cool warm, huge tiny, sick healthy, gentle violent, fresh stale, generous selfish
"""

PAST = """
go went, see saw, eat ate, drink drank, run ran, swim swam, sing sang, ring rang, begin began, come came,
become became, give gave, take took, make made, break broke, speak spoke, wake woke, write wrote, ride rode,
drive drove, rise rose, fly flew, grow grew, know knew, throw threw, blow blew, draw drew, buy bought,
bring brought, think thought, catch caught, teach taught, fight fought, find found, tell told, sell sold, hold held,
stand stood, understand understood, sit sat, get got, forget forgot, win won, lose lost, leave left, feel felt,
keep kept, sleep slept, sweep swept, meet met, feed fed, lead led, bleed bled, build built, send sent, spend spent,
lend lent, bend bent, hear heard, say said, pay paid, lay laid, choose chose, freeze froze, steal stole, wear wore,
tear tore, bite bit, hide hid, light lit, slide slid, dig dug, stick stuck, hang hung, shine shone, shoot shot,
do did, have had, fall fell, hurt hurt, cut cut, put put, shut shut, let let, hit hit, cost cost, walk walked,
talk talked, play played, jump jumped, look looked, help helped, call called, want wanted, work worked, wash washed,
watch watched, open opened, close closed, love loved, like liked, hope hoped, bake baked, dance danced,
smile smiled, move moved, cry cried, try tried, carry carried, hurry hurried, marry married, study studied,
copy copied, stop stopped, plan planned, drop dropped, hop hopped, clap clapped, rub rubbed, hug hugged, ask asked,
answer answered, paint painted, climb climbed, cook cooked, clean cleaned, laugh laughed, shout shouted,
listen listened, learn learned, visit visited, wait waited, need needed
"""

CATEGORY = {
    "fruit": "apple pear plum banana grape lemon cherry peach mango melon",
    "vegetable": "carrot potato onion cabbage spinach pea bean leek turnip broccoli",
    "mammal": "dog cat cow horse lion tiger rabbit fox whale monkey goat elephant",
    "bird": "duck hen owl eagle robin parrot swan crow sparrow goose penguin pigeon",
    "fish": "salmon trout cod tuna herring shark carp sardine haddock",
    "insect": "ant bee wasp beetle butterfly moth mosquito cricket ladybird",
    "reptile": "snake lizard crocodile tortoise turtle gecko alligator",
    "flower": "rose tulip daisy lily daffodil poppy violet sunflower orchid",
    "tree": "oak pine elm willow maple birch beech cedar palm",
    "vehicle": "car bus lorry van train tram bicycle tractor taxi motorbike",
    "clothing": "shirt coat hat sock dress skirt scarf jacket jumper glove",
    "furniture": "chair table sofa bed desk shelf cupboard wardrobe stool bench",
    "instrument": "piano violin guitar drum flute trumpet harp cello clarinet",
    "tool": "hammer spanner drill screwdriver spade rake axe chisel",
    "shape": "circle square triangle rectangle oval hexagon pentagon cube",
    "building": "house church castle hotel library museum palace cottage barn",
    "drink": "milk water tea coffee juice lemonade cocoa cider",
    "metal": "gold silver iron copper tin lead zinc steel",
    "sport": "tennis football rugby golf hockey swimming boxing cycling",
    "gem": "diamond ruby emerald sapphire pearl opal",
    "spice": "pepper cinnamon ginger nutmeg saffron",
    "planet": "Mars Venus Saturn Jupiter Mercury Neptune Uranus",
}

COUNTRY = """
France Paris Europe, Italy Rome Europe, Spain Madrid Europe, Germany Berlin Europe, Greece Athens Europe,
Portugal Lisbon Europe, Ireland Dublin Europe, Poland Warsaw Europe, Austria Vienna Europe, Norway Oslo Europe,
Sweden Stockholm Europe, Finland Helsinki Europe, Denmark Copenhagen Europe, Belgium Brussels Europe,
Hungary Budapest Europe, Iceland Reykjavik Europe, Romania Bucharest Europe, Bulgaria Sofia Europe,
Croatia Zagreb Europe, Serbia Belgrade Europe, Ukraine Kyiv Europe, Albania Tirana Europe, Malta Valletta Europe,
Estonia Tallinn Europe, Latvia Riga Europe, Lithuania Vilnius Europe, Slovakia Bratislava Europe,
Slovenia Ljubljana Europe, Britain London Europe, Japan Tokyo Asia, China Beijing Asia, India New_Delhi Asia,
Thailand Bangkok Asia, Vietnam Hanoi Asia, Nepal Kathmandu Asia, Iran Tehran Asia, Iraq Baghdad Asia,
Mongolia Ulaanbaatar Asia, Pakistan Islamabad Asia, Bangladesh Dhaka Asia, Jordan Amman Asia, Lebanon Beirut Asia,
Qatar Doha Asia, Oman Muscat Asia, Cambodia Phnom_Penh Asia, Laos Vientiane Asia, Malaysia Kuala_Lumpur Asia,
Egypt Cairo Africa, Kenya Nairobi Africa, Morocco Rabat Africa, Ghana Accra Africa, Nigeria Abuja Africa,
Ethiopia Addis_Ababa Africa, Uganda Kampala Africa, Senegal Dakar Africa, Tunisia Tunis Africa,
Algeria Algiers Africa, Angola Luanda Africa, Zambia Lusaka Africa, Zimbabwe Harare Africa, Rwanda Kigali Africa,
Sudan Khartoum Africa, Libya Tripoli Africa, Mali Bamako Africa, Somalia Mogadishu Africa, Namibia Windhoek Africa,
Canada Ottawa North_America, Mexico Mexico_City North_America, Cuba Havana North_America,
Jamaica Kingston North_America, Panama Panama_City North_America, Haiti Port-au-Prince North_America,
Honduras Tegucigalpa North_America, Brazil Brasilia South_America, Argentina Buenos_Aires South_America,
Chile Santiago South_America, Peru Lima South_America, Colombia Bogota South_America,
Venezuela Caracas South_America, Ecuador Quito South_America, Uruguay Montevideo South_America,
Paraguay Asuncion South_America, Guyana Georgetown South_America
"""

COLOUR = """
grass green, snow white, coal black, blood red, the_sky blue, milk white, soot black, a_lemon yellow,
a_banana yellow, a_tomato red, a_carrot orange, a_pumpkin orange, chocolate brown, mud brown, a_crow black,
a_swan white, a_frog green, a_flamingo pink, salt white, sugar white, ink black, a_cucumber green, spinach green,
broccoli green, a_cherry red, a_strawberry red, a_raspberry red, a_fire_engine red, a_canary yellow, the_sun yellow,
butter yellow, a_daffodil yellow, an_aubergine purple, lavender purple, a_violet purple, ash grey, an_elephant grey,
cement grey, a_mouse grey, a_dolphin grey, gold yellow, a_polar_bear white, flour white, cotton white, rice white,
a_sunflower yellow, a_poppy red, a_ladybird red, a_leaf green, a_pea green, moss green, a_lime green,
an_emerald green, a_ruby red, a_sapphire blue, the_sea blue, a_bluebell blue, tar black, a_panther black,
a_tyre black, a_tree_trunk brown, a_coconut brown, coffee brown, a_walnut brown, a_chestnut brown,
an_apricot orange, a_tangerine orange, a_salmon_fillet pink, a_piglet pink, honey gold, a_cornflower blue,
lettuce green, a_beetroot purple, a_plum purple
"""

SOUND = """
dog woof, cat meow, cow moo, duck quack, sheep baa, pig oink, horse neigh, lion roar, snake hiss, bee buzz,
owl hoot, mouse squeak, frog croak, hen cluck, wolf howl, donkey bray, crow caw, turkey gobble, bear growl,
dove coo, goat bleat, elephant trumpet, cricket chirp, goose honk, parrot squawk, sparrow tweet, chick cheep,
monkey chatter
"""

YOUNG = """
dog puppy, cat kitten, cow calf, horse foal, sheep lamb, pig piglet, goat kid, hen chick, duck duckling,
goose gosling, swan cygnet, lion cub, deer fawn, frog tadpole, kangaroo joey, owl owlet, eagle eaglet, hare leveret,
butterfly caterpillar, spider spiderling, seal pup, elephant calf, bear cub, fox cub, wolf pup, tiger cub,
whale calf, pigeon squab, salmon fry, eel elver
"""

COMPARATIVE = """
big bigger biggest, small smaller smallest, tall taller tallest, short shorter shortest, fast faster fastest,
slow slower slowest, old older oldest, young younger youngest, new newer newest, good better best, bad worse worst,
happy happier happiest, sad sadder saddest, rich richer richest, poor poorer poorest, strong stronger strongest,
weak weaker weakest, light lighter lightest, dark darker darkest, hot hotter hottest, cold colder coldest,
wet wetter wettest, dry drier driest, clean cleaner cleanest, dirty dirtier dirtiest, hard harder hardest,
soft softer softest, loud louder loudest, high higher highest, low lower lowest, near nearer nearest,
early earlier earliest, late later latest, wide wider widest, thick thicker thickest, thin thinner thinnest,
deep deeper deepest, heavy heavier heaviest, sweet sweeter sweetest, brave braver bravest, kind kinder kindest,
safe safer safest, easy easier easiest, cheap cheaper cheapest, smooth smoother smoothest, sharp sharper sharpest,
tight tighter tightest, long longer longest, fat fatter fattest, flat flatter flattest, warm warmer warmest,
cool cooler coolest, nice nicer nicest, large larger largest, fine finer finest, pretty prettier prettiest,
funny funnier funniest, lucky luckier luckiest, busy busier busiest, noisy noisier noisiest, angry angrier angriest,
hungry hungrier hungriest, lazy lazier laziest, bright brighter brightest, quick quicker quickest,
great greater greatest, proud prouder proudest, clear clearer clearest, fresh fresher freshest, calm calmer calmest
"""

JOB = """
bakes_bread baker, teaches_children teacher, grows_crops farmer, flies_planes pilot, catches_fish fisherman,
cuts_hair barber, mends_teeth dentist, heals_animals vet, puts_out_fires firefighter, paints_pictures painter,
writes_books author, sings_songs singer, drives_a_bus driver, sells_meat butcher, sells_flowers florist,
brings_the_post postman, builds_walls bricklayer, mends_pipes plumber, works_with_wood carpenter,
makes_clothes tailor, catches_thieves policeman, digs_for_coal miner, looks_after_books librarian,
cooks_in_a_restaurant chef, serves_food_at_tables waiter, plays_the_piano pianist, plays_the_violin violinist,
plays_the_drums drummer, studies_the_stars astronomer, travels_in_space astronaut, takes_photographs photographer,
writes_for_a_newspaper journalist, writes_poems poet, acts_in_plays actor, dances_on_stage dancer,
looks_after_sheep shepherd, sails_the_seas sailor, rides_in_horse_races jockey, designs_houses architect,
mends_wires electrician, judges_in_court judge, tells_jokes comedian, does_magic_tricks magician,
keeps_bees beekeeper, looks_after_gardens gardener, guards_a_goal goalkeeper, nurses_the_sick nurse,
carves_statues sculptor, fights_in_an_army soldier, rules_a_kingdom king, mends_cars mechanic, makes_pots potter,
shoes_horses blacksmith, mends_shoes cobbler, sells_medicine chemist, programs_computers programmer
"""

NAMES = "Tom Anna Ben Lucy Sam Emma Max Rose Jack Ella Leo Nora Finn Mary Paul Kate"

LIST_WORDS = """
cat dog sun moon tree book cup hat red blue fish bird milk bread door ship star rain leaf king cake ball box egg
bell shoe lamp ring road hill
"""
